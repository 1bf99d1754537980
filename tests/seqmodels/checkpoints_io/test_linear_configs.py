"""What config.json of a family may say, and what is refused by name."""

import pytest

from seqmodels import language_model
from seqmodels.checkpoints_io import architectures
from seqmodels.checkpoints_io.architectures import HFConfig, decoder
from seqmodels.modules import pattern

SMALL = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 3}
SOFTMAX = {"num_attention_heads": 4, "intermediate_size": 48}


def read(model_type, **fields):
    return read_all(model_type, SMALL | fields)


def read_all(model_type, fields):
    return architectures.get(model_type).model_config(HFConfig(fields, "config.json"))


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("mamba2", {"num_heads": 3, "head_dim": 16}, "3 heads of 16 are not expand .* = 64"),
        ("mamba2", {"num_heads": 4, "head_dim": 16, "time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        ("bamba", SOFTMAX | {"mamba_n_heads": 4, "attn_layer_indices": [3]}, "not within 3 layers"),
        ("bamba", SOFTMAX | {"mamba_n_heads": 4, "attn_layer_indices": "1"}, "must be a list of int"),
        ("qwen3_next", {"layer_types": ["full_attention", "mamba", "mamba"]}, "layer_types has 'mamba'"),
        ("qwen3_next", {"num_experts": 10**9}, "num_experts is 1000000000; at most"),
        ("minimax", {"num_attention_heads": 4, "layer_types": ["x"] * 3}, "layer_types has 'x'"),
        ("recurrent_gemma", {"num_attention_heads": 4, "block_types": ["mlp"]}, "block_types"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode is 'fused'; only 'single'"),
        ("gla", {"use_short_conv": True}, "use_short_conv is True; only False"),
        ("gla", {"num_kv_heads": 2}, "num_kv_heads is 2; only 4"),
        ("gla", {"attn": {"layers": [0, 0], "num_heads": 2}}, "attn names layer 0 twice"),
        ("gla", {"attn": [{"layers": [1]}]}, "attn lacks 'num_heads'"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm is 'sum'; only 'l2'"),
        ("delta_net", {"num_heads": 5}, "num_heads 5 must divide the key width 32"),
        ("hgrn2", {"use_lower_bound": False}, "use_lower_bound is False"),
        ("gla", {"expand_k": -0.5}, "expand_k is -0.5; it must be a positive number"),
        ("recurrent_gemma", {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim is False"),
        ("recurrent_gemma", {"num_attention_heads": 4, "logits_soft_cap": 0}, "logits_soft_cap is 0.0"),
        ("xlstm", {"output_logit_soft_cap": 0, "embedding_dim": 32}, "output_logit_soft_cap is 0.0"),
    ],
)  # fmt: skip
def test_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        read(model_type, **fields)


def outcome(model_type, fields):
    try:
        return read_all(model_type, fields)
    except ValueError:
        return "refused"


@pytest.mark.parametrize("model_type", architectures.names())
def test_null_is_absent(model_type, monkeypatch):
    """Null and absent fields are read alike, or refused alike, unless null is a value of theirs."""
    own = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "mamba2": {"num_heads": 4, "head_dim": 16},
        "xlstm": {"embedding_dim": 32, "num_blocks": 3},
        "bamba": {"mamba_n_heads": 4},
    }
    fields, names, get = SMALL | SOFTMAX | own.get(model_type, {}), set(), HFConfig.get

    def recording_get(config, field, default=None):
        names.add(field)
        return get(config, field, default)

    monkeypatch.setattr(HFConfig, "get", recording_get)
    read(model_type, **fields)
    monkeypatch.undo()
    assert "tie_word_embeddings" in names
    for name in names - {"num_key_value_heads", "sliding_window"}:
        absent = {k: v for k, v in fields.items() if k != name}
        assert outcome(model_type, absent) == outcome(model_type, absent | {name: None}), name


def test_null_of_fields_with_a_family_default():
    xlstm = {"embedding_dim": 32, "num_blocks": 3, "num_hidden_layers": None}
    assert read("xlstm", **xlstm)["num_layers"] == 3
    nulls = {"tie_word_embeddings": None, "rope_theta": None, "max_position_embeddings": None}
    assert read("smollm3", **SOFTMAX, **nulls) == read("smollm3", **SOFTMAX)
    # As in transformers, null is as many key heads as query heads, not the family's 8.
    assert softmax_options("mistral", num_key_value_heads=None)[0]["num_kv_heads"] == 4


LINEAR_BY_2 = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen3", "bamba", "qwen3_next", "recurrent_gemma", "minimax"]
)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope scaling 'longrope' is not supported"),
        ({"rope_parameters": {"type": "dynamic"}}, "lacks 'factor'"),
        ({"rope_scaling": {"factor": 4.0}}, "factor is 4.0 without a rope_type"),
        ({"rope_parameters": {"full_attention": LINEAR_BY_2}}, "full_attention is an object; one rotation for each"),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": LINEAR_BY_2}, "'yarn' in rope_par.* 'linear' in rope_sc"),
        ({"rope_parameters": LINEAR_BY_2 | {"factor": 0}}, "factor is 0.0; it must be a positive"),
        ({"rope_theta": -1}, "rope_theta is -1.0; it must be a positive"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5; it must be 1"),
    ],
)  # fmt: skip
def test_rotations_that_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        read(model_type, **SOFTMAX, mamba_n_heads=4, **fields)


def softmax_options(model_type, **fields):
    config = read(model_type, **SOFTMAX, mamba_n_heads=4, **fields)
    specs = [s for s in pattern.layers(config["pattern"], 3) if s.name == "attention"]
    return [dict(spec.options) for spec in specs]


def test_rotations():
    """As a fraction of each head and scaled, from new fields and old; all of the head where a
    family knows no fraction."""
    parameters = {"rope_theta": 5e5, "partial_rotary_factor": 0.25} | LINEAR_BY_2
    options = {"rope_base": 5e5, "rope_fraction": 0.25, "rope_scaling": ("linear", 2.0)}
    older = {
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    for fields in ({"rope_parameters": parameters}, older, older | {"rope_parameters": parameters}):
        (found,) = softmax_options("recurrent_gemma", **fields)
        assert options.items() <= found.items()
    assert (
        parameters.items() == decoder.rope_fields(options, partial=True)["rope_parameters"].items()
    )
    (found,) = softmax_options("bamba", attn_layer_indices=[1], **older)
    assert found["rope_fraction"] == 0.5  # as in transformers
    for model_type in ("llama", "minimax"):
        with pytest.raises(ValueError, match="partial_rotary_factor is 0.5; it must be 1 for"):
            softmax_options(model_type, partial_rotary_factor=0.5)


def test_rotations_beyond_the_context():
    """The lengths of yarn and dynamic, and what their kind does not read; out again."""
    context = {"max_position_embeddings": 64}
    unread = {"original_max_position_embeddings": 32, "high_freq_factor": 4.0, "finetuned": True}
    for beside in ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}):
        found, *_ = softmax_options("llama", **context, rope_scaling=LINEAR_BY_2 | unread, **beside)
        assert (found["rope_scaling"], found["max_length"]) == (("linear", 2.0), 64)
    assert found["rope_base"] == 1e6
    dynamic = {"type": "dynamic", "factor": 4.0}
    found, *_ = softmax_options("llama", **context, rope_scaling=dynamic | unread)
    assert (found["rope_scaling"], found["max_length"]) == (("dynamic", 4.0, 64), 256)
    fields = decoder.rope_fields({"rope_base": 1e4} | found)
    assert fields["max_position_embeddings"] == 64 and fields["rope_scaling"]["factor"] == 4.0
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    found, *_ = softmax_options("bamba", attn_layer_indices=[1], **context, rope_parameters=yarn)
    assert found["rope_scaling"][:3] == ("yarn", 4.0, 32) and found["max_length"] == 128
    assert yarn.items() <= decoder.rope_fields({"rope_base": 1e4} | found)["rope_scaling"].items()


def test_fields_that_no_family_reads():
    for field, value in {
        "quantization_config": {"bits": 4},
        "logit_scale": 0.5,
        "use_qk_norm": True,
    }.items():
        with pytest.raises(ValueError, match=f"{field} is .*; only"):
            architectures.check_supported(HFConfig({field: value}, "config.json"))
    architectures.check_supported(HFConfig({"logits_scaling": 1, "rope_interleaved": False}, ""))


def test_windows():
    """Which layers have one, where the config leaves layer_types or the window out."""

    def windows(model_type, **fields):
        return [o.get("window") for o in softmax_options(model_type, **fields)]

    assert (
        windows("mistral") == [4096] * 3 and windows("mistral", sliding_window=None) == [None] * 3
    )
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("qwen2", **used) == [None] * 3  # from layer 28 on
    assert windows("qwen2", **used, max_window_layers=0) == [8] * 3
    assert windows("qwen2", use_sliding_window=True, max_window_layers=0) == [None] * 3
    # SmolLM3 has them where it has no rotation.
    assert windows("smollm3", **used, no_rope_layers=[1, 0, 1]) == [None, 8, None]
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert windows("mistral", sliding_window=8, layer_types=types) == [8] * 3  # as in transformers
    assert windows("qwen2", **used, layer_types=types) == [None, 8, None]
    with pytest.raises(ValueError, match="sliding_window is 0; it must be a positive integer"):
        windows("mistral", sliding_window=0)
    with pytest.raises(ValueError, match="max_window_layers is 'all'"):
        windows("qwen2", max_window_layers="all")


def test_published_defaults():
    """Fields that a config.json leaves out have the values that their libraries give them."""
    config = read("qwen3_next", num_hidden_layers=4)
    specs = pattern.layers(config["pattern"], 4)
    assert [spec.name for spec in specs] == 3 * ["gated_delta_net"] + ["attention"]
    assert dict(specs[3].options)["rope_fraction"] == 0.25
    assert config["channel_mixer"].startswith("moe(num_experts=512, experts_per_token=10, d_ff=512")
    (minimax, _), (smollm, *_) = softmax_options("minimax"), softmax_options("smollm3")
    assert (minimax["rope_base"], smollm["rope_base"], smollm["num_kv_heads"]) == (1e6, 2e6, 4)
    contexts = {"mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768, "llama": 2048}
    assert {m: softmax_options(m)[0]["max_length"] for m in contexts} == contexts
    config = read("recurrent_gemma", hidden_size=2560, num_hidden_layers=26)
    names = [spec.name for spec in pattern.layers(config["pattern"], 26)]
    assert names[:4] == ["rg_lru", "rg_lru", "attention", "rg_lru"]
    assert config["embedding_scale"] == 50.5  # sqrt(2560) in bfloat16
    assert read("gla", hidden_size=1024)["d_ff"] == 2816
    assert read("gla", hidden_act="silu") == read("gla", hidden_act="swish") == read("gla")
    for model_type in ("mamba", "mamba2"):
        sizes = {"num_heads": 4, "head_dim": 16}
        assert read(model_type, **sizes)["float32_residual"]
        assert not read(model_type, **sizes, residual_in_fp32=False)["float32_residual"]
    assert read("xlstm", hidden_size=4096)["d_ff"] == 10_944


def test_what_a_layout_has_no_place_for():
    model = language_model.from_config(
        {"vocab_size": 11, "d_model": 32, "num_layers": 2, "pattern": "gla + retnet"}
    )
    with pytest.raises(ValueError, match="only gla and attention have a place .* not retnet"):
        architectures.get("gla").hf_config({}, model.mixers)
