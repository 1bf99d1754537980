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

from experiments import loop, pretrained, run_record
from seqmodels import checkpoints_io, language_model
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
    return pretrained.write(pretrained.find(str(source)), layout, out, **options)


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
    start, there = pretrained.find(str(workdir)), checkpoints_io.load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, start.params, there.params)
    with pytest.raises(ValueError, match="holds a run already"):
        convert(folder, "workdir", workdir)
    trained = loop.train(on_a_little_text(config, tmp_path), workdir, devices=jax.devices()[:1])
    assert trained["steps"] == 2
    convert(workdir, "llama", tmp_path / "out")
    exported = pretrained.load(str(tmp_path / "out"))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), exported.params, there.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3
    assert exported.document_token == "<|endoftext|>"


def test_a_model_of_bytes_keeps_its_tokenizer(tmp_path):
    config = MODEL | {"vocab_size": 320}  # rounded up
    model = language_model.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    kept = {"model_type": "seqmodels", "tokenizer": "bytes", "document_token": ""}
    checkpoints_io.save_pretrained(tmp_path, config, params, hf_config=kept)
    loaded = pretrained.load(str(tmp_path))
    assert loaded.prompt_tokens("ab") == [256, 97, 98]
    with pytest.raises(ValueError, match="has no chat template"):
        loaded.chat_tokens([])
    checkpoints_io.save_pretrained(tmp_path, config, params)
    with pytest.raises(ValueError, match="has no tokenizer.json; give the path of one"):
        pretrained.load(str(tmp_path))
    convert(tmp_path, "seqmodels", tmp_path / "told", tokenizer="bytes")
    assert pretrained.load(str(tmp_path / "told")).prompt_tokens("ab") == [256, 97, 98]


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
    assert pretrained.load(str(own)).document_token == "<|endoftext|>"
    convert(own, "llama", back)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_prompts_and_conversations(folder):
    loaded = pretrained.load(str(folder))
    ids = loaded.chat_tokens([{"role": "user", "content": "abc"}])
    assert ids == [1, *loaded.prompt_tokens("abc"), 2] and len(ids) == 5
    assert loaded.stop_tokens == {0, 2} and loaded.prompt_tokens("") == [0]
    assert dict(loaded.with_max_len(8).model.mixers[0].options)["max_length"] == 8
    with pytest.raises(ValueError, match="max_len is 103; the context of .* is 64 tokens"):
        loaded.with_max_len(103)


@pytest.mark.slow
def test_the_programs(folder, tmp_path):
    out = tmp_path / "run"
    done = python("experiments.convert", f"--source={folder}", "--to=workdir", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "parameters, float32" in done.stdout and f"wrote {out}/checkpoints/0" in done.stdout
    of_model, of_run = (
        python("experiments.generate", f, "--prompt=abc", "--length=4", "--temperature=0")
        for f in (f"--model={folder}", f"--workdir={out}")
    )
    assert of_model.returncode == 0, of_model.stderr
    assert of_run.returncode == 0, of_run.stderr
    assert of_model.stdout.startswith("abc")
    refused = python("experiments.generate", f"--model={folder}", f"--workdir={out}")
    assert refused.returncode == 2 and "give one of --workdir" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_template_is_a_guest():
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="cannot be rendered: .*unsafe"):
        pretrained.render_chat("{{ messages.__class__.__mro__ }}", messages, {})
    with pytest.raises(ValueError, match="cannot be rendered: only users"):
        pretrained.render_chat("{{ raise_exception('only users') }}", messages, {})
    with pytest.raises(ValueError, match="cannot be rendered: .*zero"):
        pretrained.render_chat("{{ 1 // 0 }}", messages, {})


def test_one_of_several_templates_and_ends_of_text(folder, tmp_path):
    found = checkpoints_io.load_pretrained(folder)
    ends = dataclasses.replace(found, hf_config=found.hf_config | {"eos_token_id": [2, 0]})
    loaded = pretrained.with_tokenizer(ends)
    assert loaded.stop_tokens == {0, 2}
    assert loaded._special_tokens()["eos_token"] == "<bot>"
    alone = tmp_path / "alone" / "tokenizer.json"  # with nothing that describes it
    alone.parent.mkdir()
    alone.write_bytes((folder / "tokenizer.json").read_bytes())
    out = tmp_path / "out"
    pretrained.write(ends, "llama", out, tokenizer=str(alone))
    described = out / "tokenizer_config.json"
    assert json.loads(described.read_text())["eos_token"] == "<bot>"
    (out / "chat_template.jinja").unlink(missing_ok=True)
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    described.write_text(json.dumps({"chat_template": several}))
    assert checkpoints_io.load_pretrained(out).chat_template == "yes"


def test_a_tokenizer_of_another_model(folder, tmp_path):
    (tmp_path / "other").mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.save(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 2 ids and the model .* it is another model's"):
        pretrained.load(str(folder), str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(ValueError, match="nowhere.json' is no tokenizers file"):
        pretrained.load(str(folder), str(tmp_path / "nowhere.json"))
    found = checkpoints_io.load_pretrained(folder)
    for other in ("other/tokenizer.json", "nowhere.json"):
        with pytest.raises(ValueError, match="another model's|no tokenizers file"):
            pretrained.write(found, "llama", tmp_path / "out", tokenizer=str(tmp_path / other))
    assert not (tmp_path / "out").exists()
