"""`seqmodels.load` and what it returns: text from folders, GGUF files, hub names and runs."""

import dataclasses
import json
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqmodels
from experiments.inference import pretrained
from experiments.training import run_record, steps
from experiments.training.checkpoints import Checkpoints
from seqmodels import checkpoints_io, language_model, loading
from seqmodels.text import sampling
from tests.experiments import tiny
from tests.experiments.test_convert import write_tokenizer

CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<bot>"
MODEL = {"d_model": 16, "num_layers": 2, "d_ff": 24, "norm_eps": 1e-6}


def random_params(config, scale=4.0):
    model = language_model.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = nn.meta.unbox(params)
    # Larger weights, so that the most likely token depends on what came before.
    return jax.tree.map(lambda p: scale * p if p.ndim > 1 else p, params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama of other programs, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    pattern = "attention(num_heads=2, max_length=400)"
    config = MODEL | {"pattern": pattern, "vocab_size": write_tokenizer(folder)}
    checkpoints_io.save_pretrained(
        folder, config, random_params(config), architecture="llama", hf_config={"eos_token_id": 2}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return seqmodels.load(folder)


def ids_after(loaded, ids, length):
    """The most likely ids after these, by the logits of the whole each time, up to an end token."""
    apply, new = jax.jit(loaded.model.apply), []
    for _ in range(length):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids + new)] = ids + new
        logits_BTW, _ = apply({"params": loaded.params}, padded)
        new.append(int(logits_BTW[0, len(ids + new) - 1].argmax()))
        if new[-1] in loaded.stop_tokens:
            return new[:-1]
    return new


def test_greedy_text_is_the_argmax(loaded):
    ids = loaded.prompt_tokens("efgh")
    expected = ids_after(loaded, ids, 12)
    assert len(set(expected)) > 3
    text = loaded.generate("efgh", max_new_tokens=12)
    whole = loaded.tokenizer.decode(ids + expected)
    assert "efgh" + text == whole
    assert loaded.generate(ids, max_new_tokens=12) == text
    assert loaded.generate(np.array(ids), max_new_tokens=12) == text


def test_pieces_of_a_stream_are_the_text(loaded):
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 90, "top_p": 0.95, "seed": 3}
    prompts = ["efgh", "x", "yz"]
    texts = loaded.generate(prompts, batch_size=2, **options)
    assert len(set(texts)) == 3 and texts != loaded.generate(prompts, **options | {"seed": 4})
    pieces = list(loaded.generate("efgh", stream=True, **options))
    assert len(pieces) > 1 and "".join(pieces) == texts[0]
    streamed = [""] * 3
    for number, piece in loaded.generate(prompts, stream=True, **options):
        streamed[number] += piece
    assert streamed == texts


def test_a_text_ends_before_a_stop_string_and_at_an_end_token(loaded):
    whole = loaded.generate("efgh", max_new_tokens=12)
    stop = whole[3:5]
    for asked in (stop, ["never there", stop]):
        assert loaded.generate("efgh", max_new_tokens=12, stop=asked) == whole[: whole.index(stop)]
    ids = loaded.prompt_tokens("efgh")
    end = ids_after(loaded, ids, 12)[4]
    tokens = dataclasses.replace(loaded.found.tokens, eos=(end,))
    ending = dataclasses.replace(loaded, found=dataclasses.replace(loaded.found, tokens=tokens))
    expected = ids_after(ending, ids, 12)
    assert len(expected) <= 4
    assert "efgh" + ending.generate("efgh", max_new_tokens=12) == loaded.tokenizer.decode(
        ids + expected
    )


def test_questions_are_put_into_the_chat_template(loaded):
    said = [{"role": "user", "content": "abc"}]
    text = loaded.generate(said, max_new_tokens=8)
    ids = loaded.chat_tokens(said)
    assert ids[0] == 1 and ids[-1] == 2  # <user>, <bot>
    assert text == loaded.generate(ids, max_new_tokens=8)
    assert text == loaded.generate("abc", chat=True, max_new_tokens=8)
    both = loaded.generate(["abc", said], chat=True, max_new_tokens=8)
    assert both == [text, text] and text != loaded.generate("abc", max_new_tokens=8)


def test_caches_are_as_long_as_needed_and_programs_few(loaded):
    assert dict(loaded.model.mixers[0].options)["max_length"] == 400
    rooms = [dict(loaded._with_room(n).mixers[0].options)["max_length"] for n in (9, 257, 401)]
    assert rooms == [256, 400, 400]
    short, long = (loaded.with_max_len(n).generate("efgh", max_new_tokens=8) for n in (20, 400))
    assert short == long
    with pytest.raises(ValueError, match="401 is not|max_len is 401; the context .* is 400"):
        loaded.with_max_len(401)


def test_scores_are_those_of_the_logits(loaded):
    (nll_N, correct_N), other = loaded.score(["efgh", [3, 4, 5]])
    ids = loaded.prompt_tokens("efgh")
    logits_BTW, _ = loaded.model.apply({"params": loaded.params}, jnp.array([ids]))
    logp_TW = jax.nn.log_softmax(logits_BTW[0])
    np.testing.assert_allclose(nll_N, -logp_TW[jnp.arange(3), jnp.array(ids[1:])], atol=1e-4)
    assert correct_N.shape == (3,) and other[0].shape == (2,)
    np.testing.assert_allclose(loaded.score("efgh")[0], nll_N, atol=1e-5)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "there are no prompts"),
        ([[]], {}, "the prompt has no tokens"),
        (None, {}, "a prompt is a text, messages or token ids"),
        ({"role": "user"}, {}, "a prompt is a text, messages or token ids"),
        ([3, 9999], {}, "token id 9999 is not in the model's vocabulary"),
        ("a" * 390, {}, "390 prompt tokens and 12 more do not fit .*max_length=400"),
        ("a", {"max_new_tokens": 0}, "0 tokens are to be generated"),
        ("a", {"temperature": -1.0}, "temperature is -1.0"),
        ("a", {"top_p": 2.0}, "top_p is 2.0"),
        ("a", {"stop": ["x", ""]}, "stop string is empty"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_generated_is_told_before_anything_is_computed(
    loaded, monkeypatch, prompt, options, message, stream
):
    if stream and "batch_size" in options:
        return
    monkeypatch.setattr(sampling, "_initial_state", None)  # what comes first on a device
    with pytest.raises(ValueError, match=message):
        loaded.generate(prompt, stream=stream, **{"max_new_tokens": 12} | options)


def test_prompts_longer_than_the_learned_positions_are_refused(tmp_path):
    config = MODEL | {"pattern": "attention(window=4)", "vocab_size": 257, "learned_positions": 24}
    found = checkpoints_io.Pretrained(config, None, {"tokenizer": "bytes"}, "here")
    model = loading.with_tokenizer(found)
    with pytest.raises(ValueError, match="11 prompt tokens and 15 more .* learned positions .24"):
        model.generate("a" * 10, max_new_tokens=15)
    with pytest.raises(ValueError, match="here has no chat template"):
        model.generate("a", chat=True)


def test_sources_that_are_not_there(folder, tmp_path, monkeypatch):
    for source, message in (
        ("nowhere", "there is no folder 'nowhere'; give a folder .* gguf:<file>, or a hub name"),
        ("gguf:nowhere.gguf", "there is no file nowhere.gguf"),
        (tmp_path, "config.json"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            seqmodels.load(source)
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of float32"):
        seqmodels.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="is not the folder of a run: it has no step 3"):
        seqmodels.load(folder, step=3)
    (tmp_path / "student" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a linearization; its student is .*student"):
        seqmodels.load(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="a hub name needs huggingface_hub"):
        seqmodels.load("org/model")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizers, .* pip install 'linear-seqmodels"):
        seqmodels.load(folder)


def test_a_hub_name_is_the_folder_that_the_hub_gives(folder, loaded, monkeypatch):
    def snapshot_download(name, allow_patterns):
        assert name == "org/model" and "*.json" in allow_patterns
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = seqmodels.load("org/model", dtype="bfloat16")
    assert found.found.source == "org/model" and found.config["dtype"] == "bfloat16"
    assert found.params["embed"]["embedding"].dtype == "bfloat16"
    assert found.prompt_tokens("abc") == loaded.prompt_tokens("abc")


def test_a_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    from tests.seqmodels.checkpoints_io import test_gguf

    path = test_gguf.write(tmp_path / "tiny.gguf", test_gguf.tensors())
    model = seqmodels.load(f"gguf:{path}")
    assert model.stop_tokens == {0} and model.params is model.found.params
    ids = model.prompt_tokens("the bin")
    text = model.generate("the bin", max_new_tokens=6)
    assert "the bin" + text == model.tokenizer.decode(ids + ids_after(model, ids, 6))


def write_run(workdir, name="adamw", **model):
    """A run of a hybrid of bytes at steps 1 and 2; returns its parameters for evaluation."""
    config = tiny.make_config(workdir.parent, vocab_size=257, **model)
    config.optimizer.name = name
    config.model.num_layers = 2
    config.model.pattern = "gla(num_heads=2) + attention(num_heads=2, max_length=300)"
    program = steps.build(config, 32, jax.devices()[:1])
    start = program.init(0)
    params = jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, start.params)
    workdir.mkdir()
    run_record.save_config(workdir, config)
    checkpoints = Checkpoints(workdir)
    for step in (1, 2):
        state = start.replace(step=jnp.int32(step), params=params)
        checkpoints.save(state, pretrained.NothingRead())
    checkpoints.close()
    return program.evaluation_params(params, start.opt_state)


def close(params, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(a.astype("float32"), b, rtol=tolerance, atol=tolerance)


def on_mesh(workdir):
    """The run as `experiments.generate` and `evaluate` read it."""
    config = run_record.load_config(workdir)
    config.mesh.data = -1
    return pretrained.load_run(config, str(workdir))


def test_a_run(tmp_path):
    workdir = tmp_path / "run"
    expected = write_run(workdir, dtype="bfloat16")
    model, kept = seqmodels.load(workdir), loading.find(str(workdir), max_len=200)
    assert kept.params["embed"]["embedding"].dtype == "float32"
    close(kept.params, expected, 0)
    assert "max_length=200" in kept.model_config["pattern"]
    # To generate, parameters are in the dtype of the activations.
    assert model.params["embed"]["embedding"].dtype == model.config["param_dtype"] == "bfloat16"
    close(model.params, expected, 0.01)
    assert model.stop_tokens == {256}
    ids = model.prompt_tokens("12 squ.")
    assert ids == [256, *b"12 squ."] and model.prompt_tokens("") == [256]
    whole = model.tokenizer.decode(ids + ids_after(model, ids, 8))
    assert "12 squ." + model.generate("12 squ.", max_new_tokens=8) == whole
    wide = seqmodels.load(workdir, dtype="float32", step=1, max_len=100)
    assert wide.config["dtype"] == "float32" and "max_length=100" in wide.config["pattern"]


@pytest.mark.slow
def test_a_run_on_a_mesh_writes_what_it_writes_on_one_device(tmp_path):
    write_run(tmp_path / "run")
    prompts, options = ["12 squared is", ""], {"max_new_tokens": 8, "temperature": 0.5}
    one, many = seqmodels.load(tmp_path / "run"), on_mesh(tmp_path / "run")
    assert len(many.params["embed"]["embedding"].sharding.device_set) == 8
    assert one.generate(prompts, **options) == many.generate(prompts, **options)


def test_a_run_of_schedule_free_is_read_at_its_average(tmp_path):
    expected = write_run(tmp_path / "run", "schedule_free")
    model = seqmodels.load(tmp_path / "run", step=1)
    close(model.params, expected, 1e-6)
    close(on_mesh(tmp_path / "run").params, expected, 1e-6)


def test_a_run_that_cannot_be_read(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    write_run(workdir)
    for step in (0, 7):
        with pytest.raises(ValueError, match=f"no checkpoint of step {step} in .*; there are 1, 2"):
            seqmodels.load(workdir, step=step)
    fields = json.loads((workdir / "config.json").read_text())
    fields["model"]["d_model"] = 32
    (workdir / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="checkpoints/2 is of another model than config.json"):
        seqmodels.load(workdir)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ValueError, match=r"pip install 'linear-seqmodels\[train\]'"):
        seqmodels.load(workdir)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no run: there is no"):
        seqmodels.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="checkpoints holds no checkpoint"):
        seqmodels.load(tmp_path / "empty")


def modules_after(code, names):
    code += f"\nimport sys; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_takes_no_time():
    assert modules_after("import seqmodels", ("jax", "flax", "numpy")) == "[]\n"


@pytest.mark.slow
def test_models_need_no_extra():
    extras = ("tokenizers", "jinja2", "gguf", "huggingface_hub", "orbax", "optax", "experiments")
    assert modules_after("import seqmodels.loading", extras) == "[]\n"
