"""MiniMax-Text-01 (arXiv 2501.08313) checkpoints: lightning attention, some softmax attention,
weighted residuals, a mixture of experts."""

from typing import Any

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import to_text

# layer_types' name: (the mixer, its name in the fields of its residual's weights)
_KINDS = {
    "linear_attention": ("transnormer_llm", "linear_attn"),
    "full_attention": ("attention", "full_attn"),
}
_LIGHTNING = {
    "slopes": "minimax",
    "value_activation": "silu",
    "gate_activation": "sigmoid",
    "norm": "rms_norm",
}
_MODEL = parts.model_fields(
    "rms_norm_eps", vocab_size=32_000, d_model=4096, num_layers=32, norm_eps=1e-5
)
_EXPERTS = (
    parts.Field("num_local_experts", "num_experts", HFConfig.integer, 8),
    parts.Field("num_experts_per_tok", "experts_per_token", HFConfig.integer, 2),
    parts.Field("intermediate_size", "d_ff", HFConfig.integer, 14_336),
)


def _model_config(config):
    config.require(hidden_act="silu")
    config = config.with_defaults(rope_theta=1e6, max_position_embeddings=131_072)
    model = config.options(_MODEL)
    window = config.optional_integer("sliding_window")
    softmax = decoder.attention_options(
        config, model["d_model"], heads=32, kv_heads=8, window=window
    )
    own = {name: softmax[name] for name in ("num_heads", "head_dim")} | _LIGHTNING
    options = {"linear_attention": own, "full_attention": softmax}
    default = [("full_attention", "linear_attention")[i % 2] for i in range(model["num_layers"])]
    specs = [
        parts.spec(
            _KINDS[kind][0],
            **options[kind],
            mixer_residual=_weights(config, _KINDS[kind][1]),
            channel_residual=_weights(config, "mlp"),
        )
        for kind in config.layer_types(default, _KINDS)
    ]
    return model | {
        "pattern": to_text(specs),
        "channel_mixer": parts.experts_text(config, _EXPERTS),
        "norm_position": "residual",
    }


def _weights(config, which):
    """Reads the weights (a, b) of a residual x <- a x + b f(x) from the fields of f, whose names
    begin with `which`."""
    return tuple(config.number(f"{which}_{name}_factor", 1.0) for name in ("alpha", "beta"))


def _hf_config(model, specs):
    kind_of = {mixer: kind for kind, (mixer, _) in _KINDS.items()}
    parts.only(specs, *kind_of)
    softmax = parts.options_of(specs, "attention", optional=True)
    if all(layer.name != "attention" for layer in specs):
        softmax["num_heads"] = parts.option_values(specs[0])["num_heads"]
    softmax["head_dim"] = parts.option_values(specs[0])["head_dim"]
    experts = vars(_experts(model))
    fields = {
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(
            experts | {"d_ff": experts["d_ff"] or parts.given(model, "d_ff")}, _EXPERTS
        ),
        **decoder.attention_fields(softmax, model["d_model"]),
        "sliding_window": softmax["window"],
        "layer_types": [kind_of[layer.name] for layer in specs],
        "hidden_act": "silu",
    }
    for layer in specs:
        for which, option in ((_KINDS[kind_of[layer.name]][1], "mixer"), ("mlp", "channel")):
            a, b = dict(layer.options).get(f"{option}_residual", (1.0, 1.0))
            fields |= {f"{which}_alpha_factor": a, f"{which}_beta_factor": b}
    return fields


def _experts(model):
    experts = parts.experts_of(model["channel_mixer"])
    if experts is None:
        raise ValueError("this layout needs channel_mixer='moe(...)'")
    return experts


def _rules(model, specs):
    count = _experts(model).num_experts
    yield from parts.ends(model, "model.embed_tokens", "model.norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "input_layernorm", "post_attention_layernorm")
        if layer.name == "attention":
            yield from decoder.attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from _lightning(model, layer, f"{theirs}.self_attn", f"{ours}/mixer")
        theirs, ours = f"{theirs}.block_sparse_moe", f"{ours}/channel_mixer"
        yield rules.transposed(f"{theirs}.gate.weight", f"{ours}/router/kernel")
        yield from parts.experts(f"{theirs}.experts", ours, count, ("w1", "w3", "w2"))


def _lightning(model, layer, theirs, ours):
    options = parts.option_values(layer)
    H = options["num_heads"]
    K: Any = options["head_dim"] or model["d_model"] // H
    yield from parts.packed_heads(f"{theirs}.qkv_proj", ours, H, {"q": K, "k": K, "v": K})
    yield from parts.linears(theirs, ours, {"output_gate": "u", "out_proj": "o"})
    yield parts.norm(f"{theirs}.norm", f"{ours}/o_norm")


# Tables of the fixed decay, made from the layer's number.
_DECAYS = r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
ARCHITECTURE = Architecture(
    "minimax",
    "MiniMaxForCausalLM",
    _model_config,
    _hf_config,
    _rules,
    ignored=(*Architecture.ignored, _DECAYS),
)
