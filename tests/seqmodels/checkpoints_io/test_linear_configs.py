"""What config.json of a linear-time family may say, and what is refused by name."""

import pytest

from seqmodels import language_model, pattern
from seqmodels.checkpoints_io import architectures
from seqmodels.checkpoints_io.architectures import HFConfig

SMALL = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 3}


def read(model_type, **fields):
    config = HFConfig(SMALL | fields, "config.json")
    return architectures.get(model_type).model_config(config)


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("mamba2", {"num_heads": 3, "head_dim": 16}, "3 heads of 16 are not expand .* = 64"),
        ("mamba2", {"num_heads": 4, "head_dim": 16, "time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        ("bamba", {"mamba_n_heads": 4, "attn_layer_indices": [3]}, "not within 3 layers"),
        ("bamba", {"mamba_n_heads": 4, "attn_layer_indices": "1"}, "must be a list of int"),
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
    ],
)  # fmt: skip
def test_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        read(model_type, **fields)


def test_published_defaults():
    """Fields that a config.json leaves out have the values that their libraries give them."""
    config = read("qwen3_next", num_hidden_layers=4)
    specs = pattern.layers(config["pattern"], 4)
    assert [spec.name for spec in specs] == 3 * ["gated_delta_net"] + ["attention"]
    assert dict(specs[3].options)["rope_fraction"] == 0.25
    assert config["channel_mixer"].startswith("moe(num_experts=512, experts_per_token=10, d_ff=512")
    config = read("recurrent_gemma", hidden_size=2560, num_hidden_layers=26)
    names = [spec.name for spec in pattern.layers(config["pattern"], 26)]
    assert names[:4] == ["rg_lru", "rg_lru", "attention", "rg_lru"]
    assert config["embedding_scale"] == 50.5  # sqrt(2560) in bfloat16
    assert read("gla", hidden_size=1024)["d_ff"] == 2816
    assert read("xlstm", hidden_size=4096)["d_ff"] == 10_944


def test_what_a_layout_has_no_place_for():
    model = language_model.from_config(
        {"vocab_size": 11, "d_model": 32, "num_layers": 2, "pattern": "gla + retnet"}
    )
    with pytest.raises(ValueError, match="only gla and attention have a place .* not retnet"):
        architectures.get("gla").hf_config({}, model.mixers)
