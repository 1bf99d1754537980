"""Our own layout, and what is said of files that do not fit; the published layouts are in
tests/seqmodels/oracles."""

import json
import sys
import tracemalloc
import types
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import checkpoints_io, language_model, mixers
from seqmodels.checkpoints_io import architectures, files, pretrained
from seqmodels.modules import pattern
from tests.seqmodels.checkpoints_io import round_trip
from tests.seqmodels.mixers import mixer_suite

HYBRID = {
    "vocab_size": 61,
    "d_model": 16,
    "num_layers": 5,
    "pattern": "gla(num_heads=2) + gated_delta_net(num_heads=2) + attention(num_heads=2, window=4)",
    "d_ff": 24,
    "tied_embeddings": False,
}
LLAMA = {
    "vocab_size": 61,
    "d_model": 16,
    "num_layers": 3,
    "pattern": "attention(num_heads=2, max_length=32)",
    "d_ff": 24,
}


def random_params(config, seed=0):
    """Random values in the model's shapes, without compiling its initialisation."""
    random = np.random.default_rng(seed)
    leaves = pretrained.conversion.abstract_params(language_model.from_config(config))
    params = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.asarray(random.normal(size=leaf.shape) * 0.3, leaf.dtype)
    return params


def check_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    params = random_params(HYBRID)
    checkpoints_io.save_pretrained(folder, HYBRID, params, max_shard_bytes=4000)
    return folder, params


def test_any_model_of_ours_comes_back(hybrid):
    folder, params = hybrid
    loaded = checkpoints_io.load_pretrained(folder)
    check_same(params, loaded.params)
    assert not checkpoints_io.pretrained.same_model(HYBRID, loaded.model_config)
    assert len(list(folder.glob("model-*"))) > 3
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "seqmodels" and config["model"]["pattern"] == HYBRID["pattern"]


@pytest.mark.slow
def test_every_mixer_has_a_place_in_our_layout(tmp_path):
    specs = [
        pattern.MixerSpec(name, tuple(mixer_suite.SMALL_OPTIONS.get(name, ({},))[0].items()))
        for name in mixers.causal_names()
    ]
    config = LLAMA | {"d_model": 32, "num_layers": len(specs), "pattern": pattern.to_text(specs)}
    params = random_params(config)
    checkpoints_io.save_pretrained(tmp_path, config, params)
    loaded = checkpoints_io.load_pretrained(tmp_path)
    check_same(params, loaded.params)
    assert loaded.model.mixers == tuple(specs)


def test_the_file_does_not_know_whether_layers_are_scanned(hybrid):
    folder, params = hybrid
    config = HYBRID | {"num_layers": 6}  # three kinds twice: scanned
    params = random_params(config)
    checkpoints_io.save_pretrained(folder / "scanned", config, params)
    loaded = checkpoints_io.load_pretrained(folder / "scanned", overrides={"scan_layers": False})
    assert "block_4" in loaded.params and "blocks" in params
    np.testing.assert_array_equal(
        loaded.params["block_4"]["mixer"]["q"]["kernel"],
        params["blocks"]["block_1"]["mixer"]["q"]["kernel"][1],
    )
    checkpoints_io.save_pretrained(folder / "single", loaded.model_config, loaded.params)
    name = files.SINGLE_FILE
    assert (folder / "scanned" / name).read_bytes() == (folder / "single" / name).read_bytes()


def test_parameters_are_handed_over_one_by_one(hybrid):
    folder, params = hybrid
    seen = []

    def put(path, array):
        seen.append(path)
        assert isinstance(array, np.ndarray)
        return path

    loaded = checkpoints_io.load_pretrained(folder, put=put)
    assert sorted(seen) == sorted(jax.tree.leaves(loaded.params))
    assert len(seen) == len(jax.tree.leaves(params))


def test_tensors_stream_through(tmp_path):
    """Both ways no more is held than a parameter, stacked over its layers, and a tensor of it."""
    config = LLAMA | {"d_model": 256, "d_ff": 512, "num_layers": 8}
    params = jax.tree.map(np.asarray, random_params(config))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 4 * largest
    for step in (
        lambda: checkpoints_io.save_pretrained(tmp_path, config, params, architecture="llama"),
        lambda: checkpoints_io.load_pretrained(tmp_path, put=lambda path, array: None),
    ):
        pretrained.conversion.abstract_params(language_model.from_config(config))
        tracemalloc.start()
        step()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * largest


def test_dtypes(hybrid, tmp_path):
    """Gates and decays stay float32, in a bfloat16 model and in a bfloat16 file."""
    folder, params = hybrid
    loaded = checkpoints_io.load_pretrained(folder, dtype="bfloat16")
    mixer = loaded.params["block_1"]["mixer"]
    assert mixer["q"]["kernel"].dtype == jnp.bfloat16
    assert mixer["decay"]["A_log"].dtype == jnp.float32
    assert loaded.model.dtype == loaded.model.param_dtype == jnp.bfloat16
    checkpoints_io.save_pretrained(tmp_path, HYBRID, params, dtype="bfloat16")
    source = files.open_folder(tmp_path)
    wide = {name for name, entry in source.entries.items() if entry.dtype == np.float32}
    assert wide == {
        f"block_{i}.mixer.decay.{name}" for i in (1, 4) for name in ("A_log", "dt_bias")
    }
    assert {e.dtype.name for n, e in source.entries.items() if n not in wide} == {"bfloat16"}
    assert checkpoints_io.load_pretrained(tmp_path).model_config["dtype"] == "bfloat16"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_narrow_files(tmp_path, stored):
    """They take the memory that they took; float16, in which activations overflow, is computed in
    float32."""
    checkpoints_io.save_pretrained(tmp_path, LLAMA, random_params(LLAMA), dtype=stored)
    loaded = checkpoints_io.load_pretrained(tmp_path)
    assert loaded.params["embed"]["embedding"].dtype == stored
    assert loaded.model.dtype == {"float16": "float32"}.get(stored, stored)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), loaded.params)
    master = checkpoints_io.load_pretrained(tmp_path, overrides={"param_dtype": "float32"})
    check_same(master.params, wide)
    assert master.model.dtype == loaded.model.dtype
    tokens_BT = jnp.arange(24).reshape(2, 12)
    apply = jax.jit(loaded.model.apply)
    found_BTW, same_BTW = (apply({"params": p}, tokens_BT)[0] for p in (loaded.params, wide))
    np.testing.assert_array_equal(found_BTW, same_BTW)
    assert jnp.isfinite(found_BTW).all()


def rewrite(folder, change, **fields):
    """A copy of LLAMA's folder with other tensors and other fields in config.json."""
    checkpoints_io.save_pretrained(folder, LLAMA, random_params(LLAMA), architecture="llama")
    source = files.open_folder(folder)
    arrays = {name: source.read(name) for name in source.entries}
    change(arrays)
    entries = {name: files.TensorEntry(a.shape, a.dtype) for name, a in arrays.items()}
    files.write(folder, entries, arrays.__getitem__)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    def change(arrays):
        del arrays["model.layers.1.self_attn.q_proj.weight"]
        arrays["surplus.weight"] = np.zeros((3, 2), np.float32)
        arrays["model.norm.weight"] = np.zeros((17,), np.float32)
        arrays["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 16), np.int32)
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros((4,), np.float32)

    with pytest.raises(ValueError) as error:
        checkpoints_io.load_pretrained(rewrite(tmp_path, change))
    assert str(error.value).splitlines()[1:] == [
        "  missing: model.layers.1.self_attn.q_proj.weight [16, 16]",
        "  extra: surplus.weight [3, 2]",
        "  of no weights' dtype: model.layers.0.mlp.up_proj.weight is int32",
        "  misshapen: model.norm.weight should be [16], is [17]",
    ]


def test_a_second_output_matrix_of_a_tied_model(tmp_path):
    """A copy of the embedding is nothing new; another matrix is the model's, whatever config.json
    says of ties."""

    def load(change):
        def add(arrays):
            arrays["lm_head.weight"] = change(arrays["model.embed_tokens.weight"])

        return checkpoints_io.load_pretrained(rewrite(tmp_path, add, tie_word_embeddings=True))

    copied = load(lambda x: x)
    assert "output" not in copied.params and copied.model.tied_embeddings
    other = load(lambda x: x + 1)
    np.testing.assert_array_equal(
        other.params["output"]["kernel"], other.params["embed"]["embedding"].T + 1
    )
    assert not other.model_config["tied_embeddings"]
    with pytest.raises(ValueError, match=r"misshapen: lm_head.weight should be \[61, 16\]"):
        load(lambda x: x[1:])


def test_layers_of_different_dtypes(tmp_path):
    """A scanned parameter gets its layers' widest dtype; saved, tensors are what they were."""

    def change(arrays):
        for name, array in arrays.items():
            wide = ".1.self_attn.q_proj" in name
            arrays[name] = array.astype(np.float32 if wide else jnp.bfloat16)

    folder = rewrite(tmp_path / "in", change)
    loaded = round_trip.check_bytes(folder, tmp_path / "out", "llama")
    assert loaded.params["blocks"]["block_0"]["mixer"]["q"]["kernel"].dtype == np.float32


def test_numbers_beyond_float16(tmp_path):
    def change(arrays):
        arrays["model.embed_tokens.weight"][3, 0] = 7e4

    folder = rewrite(tmp_path / "in", change)
    with pytest.raises(ValueError, match="embed/embedding has numbers that float16 does not"):
        checkpoints_io.load_pretrained(folder, dtype="float16")
    loaded = checkpoints_io.load_pretrained(folder)
    with pytest.raises(
        ValueError, match="model.embed_tokens.weight has numbers that float16 does not"
    ):
        checkpoints_io.save_pretrained(
            tmp_path / "out",
            loaded.model_config,
            loaded.params,
            architecture="llama",
            dtype="float16",
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is {'quant_method'",
        ),
        ({"model_type": "gpt_oss"}, "unknown architecture 'gpt_oss'; supported are .*llama, "),
        ({"model_type": ["llama"]}, "unknown architecture"),
        ({"hidden_size": "16"}, "hidden_size is '16'; it must be a positive integer"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be silu or"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope scaling 'longrope' is not supported",
        ),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps is 'nan'"),
        ({"num_attention_heads": 3}, "num_kv_heads 2 must divide num_heads 3"),
    ],
)
def test_configs_that_cannot_be_used(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints_io.load_pretrained(rewrite(tmp_path, lambda arrays: None, **fields))


WEIRD = [
    None,
    -1,
    0,
    7,
    1.5,
    10**9,
    10**30,
    "x",
    "99999*gla",
    "gla(",
    [],
    ["x"],
    {},
    True,
    float("inf"),
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "seqmodels"])
def test_a_config_with_anything_in_it_loads_or_is_refused(architecture, tmp_path):
    config = LLAMA | {"pattern": "attention(num_heads=2, qk_norm=True, norm_eps=1e-5)"}
    config |= {"pattern": LLAMA["pattern"]} if architecture == "llama" else {}
    params = random_params(config)
    checkpoints_io.save_pretrained(tmp_path, config, params, architecture=architecture)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = json.loads(json.dumps(whole))
        node = changed
        name = random.choice(sorted(node))
        while isinstance(node[name], dict) and node[name]:
            node, name = node[name], random.choice(sorted(node[name]))
        node[name] = WEIRD[random.integers(len(WEIRD))]
        path.write_text(json.dumps(changed))
        try:
            checkpoints_io.load_pretrained(tmp_path, put=lambda path, array: None)
        except ValueError:
            refused += 1
    assert refused > 15


def test_a_context_longer_than_the_models(tmp_path):
    folder = rewrite(tmp_path, lambda arrays: None)
    with pytest.raises(ValueError, match="max_len is 33; the context of .* is 32 tokens"):
        checkpoints_io.load_pretrained(folder, max_len=33)
    loaded = checkpoints_io.load_pretrained(folder, max_len=8)
    assert dict(loaded.model.mixers[0].options)["max_length"] == 8
    out = tmp_path / "out"
    checkpoints_io.save_pretrained(
        out, loaded.model_config, loaded.params, architecture="llama", hf_config=loaded.hf_config
    )
    assert files.read_json(out / "config.json")["max_position_embeddings"] == 32


GPT2 = LLAMA | {
    "pattern": "attention(num_heads=2, rope_base=None, use_bias=True, max_length=32)",
    "channel_mixer": "gelu",
    "channel_bias": True,
    "norm": "layer_norm",
    "learned_positions": 32,
}


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Names without a prefix, buffers, and a copy of the tied matrix."""
    params = random_params(GPT2)
    checkpoints_io.save_pretrained(tmp_path, GPT2, params, architecture="gpt2")
    source = files.open_folder(tmp_path)
    arrays = {n.removeprefix("transformer."): source.read(n) for n in source.entries}
    arrays |= {f"h.{i}.attn.bias": np.ones((1, 1, 32, 32), bool) for i in range(3)}
    arrays["lm_head.weight"] = arrays["wte.weight"]
    entries = {name: files.TensorEntry(a.shape, a.dtype) for name, a in arrays.items()}
    files.write(tmp_path, entries, arrays.__getitem__)
    check_same(checkpoints_io.load_pretrained(tmp_path).params, params)


def test_a_model_that_a_layout_has_no_place_for(tmp_path):
    params = random_params(LLAMA)
    with pytest.raises(ValueError, match="no place for this model.*logit_softcap: 30.0, None"):
        checkpoints_io.save_pretrained(
            tmp_path, LLAMA | {"logit_softcap": 30.0}, params, architecture="llama"
        )
    with pytest.raises(ValueError, match="only softmax attention has a place.* gated_delta_net"):
        checkpoints_io.save_pretrained(tmp_path, HYBRID, params, architecture="llama")
    with pytest.raises(ValueError, match="the parameters are not those of the model config"):
        checkpoints_io.save_pretrained(tmp_path, LLAMA | {"d_ff": 32}, params)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no folder '.*nowhere'; give a folder with"):
        checkpoints_io.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no file .*config.json"):
        checkpoints_io.load_pretrained(tmp_path)


def test_names_on_the_hub(tmp_path, monkeypatch):
    checkpoints_io.save_pretrained(tmp_path, LLAMA, random_params(LLAMA))

    def download(name, allow_patterns):
        assert not any(".bin" in p or ".py" in p for p in allow_patterns)
        wanted = ["config.json", files.INDEX_FILE, "model-00001-of-00002.safetensors"]
        twice = ["consolidated.safetensors", "original/model.safetensors"]
        for names, asked in ((wanted, True), (twice, False)):
            assert all(any(fnmatch(n, p) for p in allow_patterns) == asked for n in names)
        if name != "org/model":
            raise OSError("no network\nand more")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert checkpoints_io.load_pretrained("org/model").source == "org/model"
    with pytest.raises(
        ValueError, match="no folder 'org/other', and the hub gave none: no network$"
    ):
        checkpoints_io.load_pretrained("org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="a hub name needs huggingface_hub"):
        checkpoints_io.load_pretrained("org/model")


def test_every_registered_architecture_is_whole():
    for name in architectures.names():
        architecture = architectures.get(name)
        assert architecture.model_type == name and architecture.class_name
