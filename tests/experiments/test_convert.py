"""`experiments.convert` and the programs that take what it writes, on tiny models."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import seqmodels
from configs import common
from experiments.data import make_dataset
from experiments.inference import pretrained
from experiments.training import loop, restore, run_record, steps
from experiments.training.checkpoints import Checkpoints, TrainState
from seqmodels import checkpoints_io, language_model, loading
from seqmodels.checkpoints_io import runs
from seqmodels.text import chat_templates, sampling
from tests.experiments import tiny

ROOT = Path(__file__).parents[2]
CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
MODEL = {
    "d_model": 16,
    "num_layers": 2,
    "pattern": "attention(num_heads=2, max_length=64)",
    "d_ff": 24,
    "norm_eps": 1e-6,
}


def write_tokenizer(folder):
    """Byte-level, without merges; three special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<user>", "<bot>", *alphabet]
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    config = MODEL | {"vocab_size": write_tokenizer(folder) + 5}
    model = language_model.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda p: 3 * p, params)
    checkpoints_io.save_pretrained(
        folder, config, params, architecture="llama", hf_config={"eos_token_id": 2}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    return folder


def convert(source, layout, out, **options):
    return pretrained.write(loading.find(str(source)), layout, out, **options)


def python(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def on_a_little_text(config, folder):
    text = tiny.make_config(folder).data
    text.update({"tokenizer": config.data.tokenizer, "document_token": config.data.document_token})
    config.data = text
    config.train.update({"steps": 2, "eval_batches": 1, "test_batches": 1})
    config.schedule.warmup_steps = 1
    config.sample.length = 0
    config.mesh.data = 1
    return config


@pytest.mark.slow
def test_a_folder_becomes_a_run_that_is_trained_on_and_exported(folder, tmp_path):
    workdir = tmp_path / "run"
    assert convert(folder, "workdir", workdir)[0] == workdir / "checkpoints" / "0"
    config = run_record.load_config(workdir)
    assert config.data.document_token == "<|endoftext|>"
    start, there = loading.find(str(workdir)), checkpoints_io.load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, start.params, there.params)
    with pytest.raises(ValueError, match="holds a run already"):
        convert(folder, "workdir", workdir)
    trained = loop.train(on_a_little_text(config, tmp_path), workdir, devices=jax.devices()[:1])
    assert trained["steps"] == 2
    convert(workdir, "llama", tmp_path / "out")
    exported = seqmodels.load(str(tmp_path / "out"))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), exported.params, there.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3
    assert exported.document_token == "<|endoftext|>"


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_run_from_narrow_weights(folder, tmp_path, stored):
    """It trains float32 parameters, that start from the stored numbers, and is exported in the
    dtypes that the folder had."""
    there, run, back, own = (tmp_path / name for name in ("there", "run", "back", "own"))
    convert(folder, "llama", there, dtype=stored)
    convert(there, "workdir", run)
    config = run_record.load_config(run)
    assert config.model.param_dtype == "float32"
    assert config.model.dtype == {"float16": "float32"}.get(stored, stored)
    start = loading.find(str(run))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(start.params)} == {"float32"}
    narrow = checkpoints_io.load_pretrained(there).params
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)), start.params, narrow
    )
    convert(run, "llama", back)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (there / name).read_bytes()
    convert(run, "seqmodels", own)
    assert json.loads((own / "config.json").read_text())["dtype"] == stored
    convert(run, "llama", back, dtype="float32")
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_reading_a_run_takes_no_more_memory_than_its_activations_ask_for(tmp_path):
    """And gives the same numbers: what is used in float32 stays so."""
    changes = {"dtype": "bfloat16", "channel_mixer": "moe(num_experts=8)", "vocab_size": 61}
    config = tiny.make_config(tmp_path, **changes)
    config.model.pattern = "lolcats(num_heads=2, window=4)"
    both = config, restore.reading_config(config)
    trained, read = (steps.build(c, 32, jax.devices()[:1]) for c in both)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype),
        trained.abstract_state.params,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, ()), pretrained.NothingRead())
    checkpoints.close()
    _, narrow = restore.evaluation_params(read, config, tmp_path)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, narrow)]
    assert sizes[1] < 0.6 * sizes[0]
    apply = jax.jit(read.model.apply)
    tokens_BT = jnp.arange(24).reshape(2, 12)
    logits = [apply({"params": tree}, tokens_BT)[0] for tree in (params, narrow)]
    np.testing.assert_array_equal(*logits)
    config.optimizer.name = "schedule_free"
    assert restore.reading_config(config).model.param_dtype == "float32"


def test_a_model_of_bytes_keeps_its_tokenizer(tmp_path):
    config = MODEL | {"vocab_size": 320}  # rounded up
    model = language_model.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    kept = {"model_type": "seqmodels", "tokenizer": "bytes", "document_token": ""}
    checkpoints_io.save_pretrained(tmp_path, config, params, hf_config=kept)
    loaded = seqmodels.load(str(tmp_path))
    assert loaded.prompt_tokens("ab") == [256, 97, 98]
    with pytest.raises(ValueError, match="has no chat template"):
        loaded.chat_tokens([])
    checkpoints_io.save_pretrained(tmp_path, config, params)
    with pytest.raises(ValueError, match="has no tokenizer.json; give the path of one"):
        seqmodels.load(str(tmp_path))
    convert(tmp_path, "seqmodels", tmp_path / "told", tokenizer="bytes")
    assert seqmodels.load(str(tmp_path / "told")).prompt_tokens("ab") == [256, 97, 98]


def test_a_run_has_rows_that_the_models_positions_reach(tmp_path):
    config = MODEL | {"num_layers": 1, "vocab_size": 257, "learned_positions": 24}
    model = language_model.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = checkpoints_io.Pretrained(config, params, {"tokenizer": "bytes"}, "here")
    pretrained.write(found, "workdir", tmp_path / "run")
    written = run_record.load_config(tmp_path / "run")
    assert (written.data.seq_len, written.sample.length) == (24, 24)


def test_layouts_there_and_back(folder, tmp_path):
    own, back = tmp_path / "own", tmp_path / "back"
    convert(folder, "seqmodels", own, dtype="bfloat16")
    assert json.loads((own / "config.json").read_text())["dtype"] == "bfloat16"
    convert(folder, "seqmodels", own)
    assert seqmodels.load(str(own)).document_token == "<|endoftext|>"
    convert(own, "llama", back)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_prompts_and_conversations(folder):
    loaded = seqmodels.load(str(folder))
    ids = loaded.chat_tokens([{"role": "user", "content": "abc"}])
    assert ids == [1, *loaded.prompt_tokens("abc"), 2] and len(ids) == 5
    assert loaded.stop_tokens == {0, 2} and loaded.prompt_tokens("") == [0]
    assert dict(loaded.with_max_len(8).model.mixers[0].options)["max_length"] == 8
    with pytest.raises(ValueError, match="max_len is 103; the context of .* is 64 tokens"):
        loaded.with_max_len(103)


def test_a_file_that_cuts_and_pads_leaves_prompts_whole(folder, tmp_path):
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(2)
    saved.enable_padding(length=9, pad_id=0)
    saved.save(str(tmp_path / "tokenizer.json"))
    loaded, other = (
        seqmodels.load(str(folder)),
        seqmodels.load(str(folder), str(tmp_path / "tokenizer.json")),
    )
    for asked in (
        lambda x: x.prompt_tokens("abcd"),
        lambda x: x.chat_tokens([{"role": "user", "content": "abcd"}]),
    ):
        assert asked(other) == asked(loaded) and len(asked(loaded)) in (4, 6)


@pytest.mark.slow
def test_the_programs(folder, tmp_path):
    out = tmp_path / "run"
    done = python("experiments.convert", f"--source={folder}", "--to=workdir", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "parameters, float32" in done.stdout and f"wrote {out}/checkpoints/0" in done.stdout
    greedy = ("--prompt=abc", "--length=4", "--temperature=0")
    of_model = python("experiments.generate", f"--model={folder}", *greedy)
    assert of_model.returncode == 0, of_model.stderr
    options = {"max_new_tokens": 4, "temperature": 0}
    assert of_model.stdout == f"abc{seqmodels.load(folder).generate('abc', **options)}\n"
    asked, asked_of_run = (
        python("experiments.generate", flag, "--chat", *greedy)
        for flag in (f"--model={folder}", f"--workdir={out}")
    )
    assert asked.returncode == asked_of_run.returncode == 0, asked_of_run.stderr
    answer = seqmodels.load(out).generate("abc", chat=True, **options)
    assert asked_of_run.stdout == asked.stdout == f"{answer}\n"
    refused = python("experiments.generate", f"--model={folder}", f"--workdir={out}")
    assert refused.returncode == 2 and "give one of --workdir" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_template_is_a_guest():
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="cannot be rendered: .*unsafe"):
        chat_templates.render("{{ messages.__class__.__mro__ }}", messages, {})
    with pytest.raises(ValueError, match="cannot be rendered: only users"):
        chat_templates.render("{{ raise_exception('only users') }}", messages, {})
    with pytest.raises(ValueError, match="cannot be rendered: .*zero"):
        chat_templates.render("{{ 1 // 0 }}", messages, {})
    with pytest.raises(ValueError, match="a conversation has one message at least"):
        chat_templates.render("x", [], {})


SAID = [
    {"role": "user", "content": "a < 'b' & \u00e9", "name": None},
    {"role": "assistant", "content": "c", "reasoning": "r"},
]


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ messages[0].content | tojson }}", '"a < \'b\' & \u00e9"'),
        ("{{ {'b': [1], 'a': none} | tojson(indent=1) }}", '{\n "b": [\n  1\n ],\n "a": null\n}'),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{{ bos_token }}|{{ pad_token }}|{{ eos_token }}", "<s>||</s>"),
        ("{{ strftime_now('%%') }}{{ strftime_now('%Y') | length }}", "%4"),
        # What an assistant said is shown as it is, and what is set there ends there.
        (
            "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content[0] }}{{ x }}"
            "{% endgeneration %}{{ x }}{% endfor %}",
            "a21c21",
        ),
        # A line of a block leaves no line behind.
        ("{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{{ 'name' in messages[0] }}", "False"),  # null is no name
        ("{{ messages[1].reasoning_content }}{{ messages[1].thinking }}", "rr"),
    ],
)  # fmt: skip
def test_templates_have_what_transformers_gives_them(template, expected):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert chat_templates.render(template, SAID, special) == expected


def test_without_jinja_it_is_said_what_to_install(folder, monkeypatch):
    loaded = seqmodels.load(folder)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "seqmodels.text.chat_templates", raising=False)
    monkeypatch.delattr("seqmodels.text.chat_templates", raising=False)
    with pytest.raises(ValueError, match="chat templates need jinja2: pip install"):
        loaded.chat_tokens(SAID)


def with_tokens(found, **fields):
    return dataclasses.replace(found, tokens=dataclasses.replace(found.tokens, **fields))


def test_tools_have_a_template_of_their_own(folder):
    found = checkpoints_io.load_pretrained(folder)
    templates = {"default": "abc", "tool_use": "{{ tools[0].name }}{{ documents[0].text }}"}
    loaded = loading.with_tokenizer(with_tokens(found, chat_templates=templates))
    assert loaded.chat_tokens(SAID) == loaded.encode("abc")
    tools, documents = [{"name": "find"}], [{"title": "T", "text": "D"}]
    assert loaded.chat_tokens(SAID, tools, documents) == loaded.encode("findD")
    loaded = loading.with_tokenizer(with_tokens(found, chat_templates={"rag": "x"}))
    with pytest.raises(ValueError, match="has templates for rag alone"):
        loaded.chat_tokens(SAID)


def test_several_ends_of_text_and_a_tokenizer_that_nothing_describes(folder, tmp_path):
    found = with_tokens(checkpoints_io.load_pretrained(folder), eos=(2, 1))
    loaded = loading.with_tokenizer(found)
    assert loaded.stop_tokens == {0, 1, 2}  # a document's start, too
    alone = tmp_path / "alone" / "tokenizer.json"
    alone.parent.mkdir()
    alone.write_bytes((folder / "tokenizer.json").read_bytes())
    pretrained.write(found, "llama", tmp_path / "out", tokenizer=str(alone))
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described["eos_token"] == "<bot>" and described["chat_template"] == CHAT
    again = checkpoints_io.load_pretrained(tmp_path / "out").tokens
    assert again == dataclasses.replace(found.tokens, names={"eos_token": "<bot>"})


def test_what_is_said_of_tokens_goes_through_a_run(folder, tmp_path):
    source = tmp_path / "source"
    pretrained.write(checkpoints_io.load_pretrained(folder), "llama", source)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0], "top_p": 0.5}
    (source / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": None}
    (source / "config.json").write_text(json.dumps(config))
    pretrained.write(checkpoints_io.load_pretrained(source), "llama", tmp_path / "direct")
    config = json.loads((tmp_path / "direct" / "config.json").read_text())
    assert config["eos_token_id"] == 2  # as it was; generation_config.json has both
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<bot>",
        "pad_token": "<user>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    (source / "chat_template.jinja").write_text(CHAT)
    tokens = checkpoints_io.load_pretrained(source).tokens
    assert (tokens.bos, tokens.eos, tokens.pad, tokens.names["eos_token"]) == (
        1,
        (2, 0),
        1,
        "<bot>",
    )
    convert(source, "workdir", tmp_path / "run")
    for layout in ("llama", "seqmodels", "mistral"):
        out = tmp_path / layout
        convert(tmp_path / "run", layout, out)
        assert checkpoints_io.load_pretrained(out).tokens == tokens
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        for name in names:
            assert (out / name).read_bytes() == (source / name).read_bytes()
        config = json.loads((out / "config.json").read_text())
        assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2, 0]
        assert config["pad_token_id"] == 1
        kept = json.loads((out / "generation_config.json").read_text())
        assert kept == generation | {"pad_token_id": 1}
        assert seqmodels.load(str(out)).chat_tokens(SAID) == seqmodels.load(
            str(source)
        ).chat_tokens(SAID)


def test_a_run_that_nothing_else_is_known_of_ends_texts_as_its_documents(tmp_path):
    config = MODEL | {"vocab_size": 260}
    model = language_model.from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    run = common.get_config()
    run.model, run.data = config, {"tokenizer": "bytes", "document_token": ""}
    found = runs.described(config, run.data.to_dict(), params, str(tmp_path))
    assert (found.tokens.bos, found.tokens.eos) == (256, (256,))
    pretrained.write(found, "llama", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["bos_token_id"] == fields["eos_token_id"] == 256
    # Its bytes are a tokenizer.json there, which other programs read.
    exported = seqmodels.load(str(tmp_path / "out"))
    text = bytes(range(128)).decode() + "na\u00efve \u4f60 \U0001f642"
    ids = [256, *text.encode()]
    assert exported.encode(text) == ids and exported.tokenizer.decode(ids) == text
    assert exported.stop_tokens == {256} and exported.tokenizer.document_id == 256
    assert exported.found.tokens.names == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    # A token of a file, and an id after the file's: documents begin with them in an exported
    # folder, too.
    run.data.tokenizer = str(tmp_path / "tokenizer.json")
    for token, start in (("<bot>", 2), ("", write_tokenizer(tmp_path))):
        run.data.document_token = token
        found = runs.described(config, run.data.to_dict(), params, "")
        pretrained.write(found, "llama", tmp_path / f"out{start}")
        exported = seqmodels.load(str(tmp_path / f"out{start}"))
        assert (exported.document_token, exported.tokenizer.document_id) == (token, start)
        assert exported.found.tokens.eos == (start,)


def test_a_tokenizer_of_another_model(folder, tmp_path):
    (tmp_path / "other").mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.save(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 2 ids and the model .* it is another model's"):
        seqmodels.load(str(folder), str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="No tokenizer file '.*nowhere.json'"):
        seqmodels.load(str(folder), str(tmp_path / "nowhere.json"))
    found = checkpoints_io.load_pretrained(folder)
    for other in ("other/tokenizer.json", "nowhere.json"):
        with pytest.raises((ValueError, FileNotFoundError), match="another model's|No tokenizer"):
            pretrained.write(found, "llama", tmp_path / "out", tokenizer=str(tmp_path / other))
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_model_lacks_is_refused_where_it_comes_up(folder, tmp_path):
    found = checkpoints_io.load_pretrained(folder)
    write_tokenizer(tmp_path)
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = found.model_config["vocab_size"]
    file.add_special_tokens([f"<more {i}>" for i in range(size + 2 - file.get_vocab_size())])
    file.save(str(tmp_path / "tokenizer.json"))
    more = found.tokens.filled(checkpoints_io.SpecialTokens(pad=size))
    loaded = loading.with_tokenizer(
        dataclasses.replace(found, tokenizer_path=tmp_path / "tokenizer.json", tokens=more)
    )
    assert loaded.tokenizer.vocab_size == size + 2
    sampling.check_ids(loaded.model, loaded.prompt_tokens("abc<user>"))
    with pytest.raises(
        ValueError, match=f"token id {size + 1} is not in the model's vocabulary of {size}"
    ):
        sampling.check_ids(loaded.model, loaded.prompt_tokens("abc<more 6>"))
    run = tmp_path / "run"
    pretrained.write(loaded.found, "workdir", run)
    config = on_a_little_text(run_record.load_config(run), tmp_path)
    resolved = loop.resolve(config, make_dataset(config.data, "train"))
    assert resolved.model.vocab_size == size
    program = steps.build(resolved, config.data.seq_len, jax.devices()[:1])
    batch = {"inputs": np.zeros((2, 4), np.int32), "labels": np.full((2, 4), size)}
    with pytest.raises(ValueError, match=f"token id {size} is not in the model's vocabulary"):
        program.put(batch)
    exported = loading.find(str(run))
    assert exported.tokens.pad == size
    beyond = dataclasses.replace(loaded.found, hf_config={"document_token": "<more 6>"})
    with pytest.raises(ValueError, match=f"documents begin with token {size + 1}"):
        loading.with_tokenizer(beyond)
