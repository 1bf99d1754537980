import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model
from seqmodels.text import sampling, scoring
from seqmodels.text.tokenizers import make_tokenizer
from tests.experiments import tokenizer_files

SIZES = {"vocab_size": 13, "d_model": 16}


@pytest.fixture(scope="module")
def hybrid():
    pattern = "gated_delta_net(num_heads=2) + attention(num_heads=2, max_length=24)"
    model = language_model.from_config(SIZES | {"pattern": pattern, "num_layers": 2})
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger weights, so that the most likely token depends on what came before.
    return model, jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params)


def tokens_after(model, params, prompt, length, **options):
    return [int(i) for (i,) in sampling.stream_batch(model, params, [prompt], length, **options)]


def text_after(ids, tokenizer, prompt=()):
    """The pieces of text of these ids, all of which count."""
    tokens = (np.array([i]) for i in ids)
    return [text for _, text in sampling.stream_texts(tokens, tokenizer, [prompt], stop_tokens=())]


def test_a_greedy_stream_is_the_teacher_forced_argmax(hybrid):
    model, params = hybrid
    prompt = [3, 1, 4, 1, 5]
    generated = tokens_after(model, params, prompt, 12, temperature=0)
    tokens = prompt + generated
    logits_BTW, _ = jax.jit(model.apply)({"params": params}, jnp.array([tokens]))
    expected = np.argmax(logits_BTW[0], axis=-1)[len(prompt) - 1 : -1]
    assert generated == expected.tolist()
    assert len(set(generated)) > 2


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4, 6, 2]]


@pytest.fixture(scope="module")
def many_states():
    """Matrix states with convolutions, a diagonal one, a window's ring, a whole cache."""
    pattern = (
        "gated_delta_net(num_heads=2) + mamba(d_state=4) + attention(num_heads=2, window=4) + "
        "attention(num_heads=2, max_length=18)"
    )
    model = language_model.from_config(SIZES | {"pattern": pattern, "num_layers": 4})
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params)


def rows(model, params, prompts, length=6, **options):
    """(prompt, step) tokens."""
    return np.stack(list(sampling.stream_batch(model, params, prompts, length, **options)), axis=1)


@pytest.mark.slow
def test_prompts_of_different_lengths_go_on_together_as_they_do_alone(many_states):
    # What is drawn does not depend on the other rows, either; one token each, since sampling
    # compiles anew.
    for options in ({"temperature": 0}, {"temperature": 2.0, "top_k": 9, "length": 1}):
        together = rows(*many_states, PROMPTS, **options)
        for number, prompt in enumerate(PROMPTS):
            alone = rows(*many_states, [prompt], numbers=[number], **options)[0]
            assert alone.tolist() == together[number].tolist()
        assert len(set(together.ravel())) > 2


@pytest.mark.slow
def test_the_state_of_a_padded_prompt_is_its_own(many_states):
    model, params = many_states

    @jax.jit
    def read(tokens_BT, segment_ids_BT):
        state = model.init_state(1)
        return model.apply({"params": params}, tokens_BT, segment_ids_BT, state)[1]

    prompt, pad = np.array(PROMPTS[:1]), np.array([[7, 2, 7]])
    tokens, ids = np.append(pad, prompt, axis=1), np.array([[0] * 3 + [1] * 5])
    padded, alone = read(tokens, ids), read(prompt, ids[:, 3:])
    states, own = (s.prefix + s.scanned + s.suffix for s in (padded, alone))
    full, own_full = states[-1], own[-1]
    visible = np.flatnonzero(full.position_BS[0] >= 0)
    np.testing.assert_array_equal(full.position_BS[0][visible], np.arange(5))
    np.testing.assert_allclose(full.k_BSGK[0][visible], own_full.k_BSGK[0][:5], atol=1e-4)
    for leaf, own_leaf in zip(*map(jax.tree.leaves, (states[:-1], own[:-1])), strict=True):
        if leaf.ndim:  # of slots that were written, the padding's count
            np.testing.assert_allclose(leaf, own_leaf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 511, 512, 513, 1791])
def test_pieces_are_powers_of_two_that_add_up(length):
    found = sampling.pieces(length)
    assert sum(found) == length and max(found) <= sampling.MAX_PIECE
    assert all(n & (n - 1) == 0 for n in found)


@pytest.mark.slow
def test_lengths_of_prompts_compile_no_more_than_their_powers_of_two(hybrid):
    model, params = hybrid
    jax.clear_caches()
    for length in range(1, 21):
        list(sampling.stream_batch(model, params, [[1] * length, [2], [3]], 2, temperature=0))
    assert sampling._read._cache_size() == 5  # 1, 2, 4, 8, 16
    assert sampling._next_token._cache_size() == 1


class Letters:
    """A letter an id."""

    document_id = 12
    special_texts = {12: ""}

    def decode(self, ids):
        return "".join("abcdefghijkl"[i] for i in ids if i != self.document_id)


@pytest.mark.slow
def test_texts_of_many_prompts_end_at_stop_strings(hybrid):
    model, params = hybrid
    whole = sampling.generate(
        model, params, Letters(), PROMPTS, 12, temperature=0, batch_size=3, stop_tokens=()
    )
    ids = rows(model, params, PROMPTS, 12, temperature=0)
    assert whole == [Letters().decode(row) for row in ids]
    stop = (whole[0][4:7], whole[2][3:5])
    cut = sampling.generate(
        model, params, Letters(), PROMPTS, 12, temperature=0, stop=stop, stop_tokens=()
    )
    for before, after in zip(whole, cut):
        places = [before.find(s) for s in stop if s in before]
        assert after == (before[: min(places)] if places else before)
    assert len(cut[0]) <= 4 and len(cut[2]) <= 3
    ended = sampling.generate(
        model, params, Letters(), PROMPTS, 12, temperature=0, stop_tokens=[ids[1, 2]]
    )
    assert ended[1] == Letters().decode(ids[1, : ids[1].tolist().index(ids[1, 2])])


def streamed(text, stop, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer("bytes")
    stream, parts = sampling.TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text):
        parts.append(stream.add(int(token)))
        if stream.ended:
            return parts
    return [*parts, stream.end()]


def test_what_may_be_a_stop_string_is_held_back_until_it_is_not():
    assert streamed("abcd", ["cde"]) == ["a", "b", "", "", "cd"]
    assert streamed("abcdef", ["cde"]) == ["a", "b", "", "", ""]
    assert streamed("aab", ["ab"]) == ["", "a", ""]
    assert streamed("abcd", ["cd", "bc"]) == ["a", "", ""]
    assert "".join(streamed("é😀!", ["😀"])) == "é"
    assert "".join(streamed("anything", [])) == "anything"
    with pytest.raises(ValueError, match="stop string is empty"):
        sampling.TextStream(None, ["a", ""])


def test_bad_prompts_are_told(hybrid):
    for prompts, message in (
        ([], "no prompts"),
        ([[1], []], "number 1 of 2.*document_id"),
        ([[1], [13]], "token id 13 .* vocabulary of 13"),
        ([[1], [1] * 20], "20 prompt tokens and 6 more"),
    ):
        with pytest.raises(ValueError, match=message):
            next(sampling.stream_batch(*hybrid, prompts, 6))
    with pytest.raises(ValueError, match="batch_size is 0"):
        sampling.generate(*hybrid, Letters(), [[1]], 2, batch_size=0)


def test_a_seed_fixes_the_text_and_another_changes_it(hybrid):
    texts = [tokens_after(*hybrid, [1], 12, temperature=2.0, seed=s) for s in (0, 0, 1)]
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
    assert len(tokens_after(model, params, [1] * 20, 5, temperature=0)) == 5
    with pytest.raises(
        ValueError, match="20 prompt tokens and 6 more do not fit.*max_length=24.*24 tokens"
    ):
        tokens_after(model, params, [1] * 20, 6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        tokens_after(*hybrid, [1], 2, **options)
    with pytest.raises(ValueError, match="document_id"):
        tokens_after(*hybrid, [], 2)
    with pytest.raises(ValueError, match="0 tokens are to be generated"):
        tokens_after(*hybrid, [1], 0)


def test_learned_positions_are_a_limit():
    """With windows no cache is too short; the table of positions ends all the same."""
    config = {"vocab_size": 7, "d_model": 8, "num_layers": 1, "pattern": "attention(window=4)"}
    model = language_model.from_config(config | {"learned_positions": 6})
    assert sampling.context_limit(model) == (6, "the model's learned positions")
    sampling.check_length(model, 5, 2)
    with pytest.raises(ValueError, match="5 prompt tokens and 3 more .* learned positions .6 tok"):
        sampling.check_length(model, 5, 3)
    with pytest.raises(ValueError, match="sequence 1 of 2 has 8 tokens, .* learned 6 positions"):
        scoring.score(model, {}, [[1, 2], [1] * 8])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    scores = scoring.score(model, params, [[1] * 7, [2, 3, 4]])  # rows are no longer than the table
    assert all(np.isfinite(nll_N).all() for nll_N, _ in scores)


def frequencies(**options):
    logits_BW = 9 + jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])).repeat(4000, axis=0)
    tokens = sampling.sample_token(jax.random.key(0), logits_BW, **options)
    return np.bincount(tokens, minlength=4) / tokens.size


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-37}, [0, 1, 0, 0]),
        ({"temperature": 1e-37, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 1e-39}, [0, 1, 0, 0]),
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
    parts = text_after(tokenizer.encode(text), tokenizer)
    assert "".join(parts) == text
    assert parts == [*"aé€😀 "]
    broken = [0xE2, 0x82, 65, 0xFF, 0xC3]
    assert "".join(text_after(broken, tokenizer)) == tokenizer.decode(broken)


TEXT = "the cat, the naïve cat and the 日本 ## 😀😀😀 cat" + " the" * 9


@pytest.mark.parametrize("kind", tokenizer_files.KINDS)
def test_a_text_goes_on_from_its_prompt_wherever_it_is_cut(kind, tmp_path):
    tokenizer = make_tokenizer(tokenizer_files.write(kind, tmp_path), tokenizer_files.END)
    ids = sampling.prompt_tokens(TEXT, tokenizer)
    whole = tokenizer.decode(ids)
    if kind in tokenizer_files.FAITHFUL:
        assert whole == TEXT
    for cut in range(len(ids)):
        told = tokenizer.decode(ids[:cut])
        if not told.endswith("\ufffd"):  # no prompt ends within a character
            parts = text_after(ids[cut:], tokenizer, ids[:cut])
            assert told + "".join(parts) == whole
            assert sum(map(bool, parts)) >= (len(ids) - cut) // 5
            assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["byte_level", "fallback", "metaspace_first", "word_piece"])
def test_the_space_before_the_first_word_is_told(kind, tmp_path):
    tokenizer = make_tokenizer(tokenizer_files.write(kind, tmp_path), tokenizer_files.END)
    ids = tokenizer.encode("the dog").tolist()
    prompt = tokenizer.encode("the").tolist()
    assert ids[: len(prompt)] == prompt

    def told(tokens, prompt):
        made = (np.array([i]) for i in tokens)
        return "".join(t for _, t in sampling.stream_texts(made, tokenizer, [prompt]))

    start = [tokenizer.document_id]
    assert told(ids[len(prompt) :], start + prompt) == " dog"
    assert told(ids, start) == "the dog"


def test_stop_strings_may_be_special_tokens(tmp_path):
    tokenizer = make_tokenizer(tokenizer_files.write("byte_level", tmp_path), tokenizer_files.END)
    turn = tokenizer_files.TURN
    for stop, expected in (
        ([turn], "the cat"),
        (["t" + turn + " and"], "the ca"),  # in part shown, in part not
        ([" dog", turn + "\n"], "the cat and the"),
        (["cats", "<|turn|>the"], "the cat and the dog"),
        (["<|tur"], "the cat"),
        ([], "the cat and the dog"),
    ):
        parts = streamed("the cat" + turn + " and the dog", stop, tokenizer)
        assert "".join(parts) == expected
    assert streamed("a" + turn + "b", ["<|turn|>c"], tokenizer) == ["a", "", "b", ""]


def test_a_stop_string_ends_inside_subwords(tmp_path):
    tokenizer = make_tokenizer(tokenizer_files.write("byte_level", tmp_path), tokenizer_files.END)
    assert "".join(streamed(TEXT, ["t and the 日"], tokenizer)) == TEXT[: TEXT.index("t and")]
