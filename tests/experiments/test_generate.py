import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sampling
from experiments.data.tokenizers import make_tokenizer
from seqmodels import language_model

SIZES = {"vocab_size": 13, "d_model": 16}


@pytest.fixture(scope="module")
def hybrid():
    pattern = "gated_delta_net(num_heads=2) + attention(num_heads=2, max_length=24)"
    model = language_model.from_config(SIZES | {"pattern": pattern, "num_layers": 2})
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger weights, so that the most likely token depends on what came before.
    return model, jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params)


def test_a_greedy_stream_is_the_teacher_forced_argmax(hybrid):
    model, params = hybrid
    prompt = [3, 1, 4, 1, 5]
    generated = list(sampling.stream_tokens(model, params, prompt, 12, temperature=0))
    tokens = prompt + generated
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.array([tokens]))
    expected = np.argmax(logits_BTW[0], axis=-1)[len(prompt) - 1 : -1]
    assert generated == expected.tolist()
    assert len(set(generated)) > 2
    stop = generated[5]
    stopped = sampling.stream_tokens(model, params, prompt, 12, temperature=0, stop_token=stop)
    assert list(stopped) == generated[: generated.index(stop)]


def test_a_seed_fixes_the_text_and_another_changes_it(hybrid):
    texts = [
        list(sampling.stream_tokens(*hybrid, [1], 12, temperature=2.0, seed=s)) for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_state_does_not_grow_with_what_was_read():
    pattern = "gated_delta_net(num_heads=2) + attention(num_heads=2, window=4)"
    model = language_model.from_config(SIZES | {"pattern": pattern, "num_layers": 2})

    def read(key, tokens_BT):
        params = model.init(key, tokens_BT)["params"]
        return model.apply({"params": params}, tokens_BT, state=model.init_state(1))[1]

    key = jax.random.key(0)
    after = [jax.eval_shape(read, key, jnp.zeros((1, length), jnp.int32)) for length in (5, 300)]
    assert jax.tree.map(lambda leaf: leaf.shape, after[0]) == jax.tree.map(
        lambda leaf: leaf.shape, after[1]
    )


def test_a_full_attention_cache_that_is_too_short_is_refused(hybrid):
    model, params = hybrid
    assert len(list(sampling.stream_tokens(model, params, [1] * 20, 5, temperature=0))) == 5
    with pytest.raises(ValueError, match="20 prompt tokens and 6 more do not fit.*max_length=24"):
        list(sampling.stream_tokens(model, params, [1] * 20, 6))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        list(sampling.stream_tokens(*hybrid, [1], 2, **options))
    with pytest.raises(ValueError, match="document_id"):
        list(sampling.stream_tokens(*hybrid, [], 2))


def frequencies(**options):
    logits_BW = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])).repeat(4000, axis=0)
    tokens = sampling.sample_token(jax.random.key(0), logits_BW, **options)
    return np.bincount(tokens, minlength=4) / tokens.size


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, np.array([0.01, 0.16, 0.04, 0.09]) / 0.3),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_draws_from_the_distribution_asked_for(options, expected):
    found = frequencies(**options)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert ((found > 0) == (np.array(expected) > 0)).all()


def test_an_empty_prompt_is_the_start_of_a_document():
    tokenizer = make_tokenizer("bytes")
    assert sampling.prompt_tokens("", tokenizer) == [256]
    assert sampling.prompt_tokens("ab", tokenizer) == [256, 97, 98]


def test_bytes_are_shown_when_their_character_is_whole():
    tokenizer = make_tokenizer("bytes")
    text = "aé€😀 "
    parts = list(sampling.stream_text(iter(tokenizer.encode(text).tolist()), tokenizer))
    assert "".join(parts) == text
    assert parts[:4] == ["a", "", "é", ""]
    broken = [0xE2, 0x82, 65, 0xFF, 0xC3]
    assert "".join(sampling.stream_text(iter(broken), tokenizer)) == tokenizer.decode(broken)


def test_subwords_stream_as_they_decode(tmp_path):
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    text = "the cat, the naïve cat and the 😀 cat " * 3
    trained.train_from_iterator([text], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text + "€😀").tolist()
    parts = list(sampling.stream_text(iter(ids), tokenizer))
    assert "".join(parts) == text + "€😀"
    assert sum(map(bool, parts)) > 20 and not any("\ufffd" in part for part in parts)
