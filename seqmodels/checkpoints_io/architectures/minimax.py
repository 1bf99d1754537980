"""MiniMax-Text-01 (arXiv 2501.08313): lightning attention, some softmax attention, weighted
residuals, a mixture of experts."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts
from seqmodels.modules import channel_mixers
from seqmodels.modules.pattern import to_text

# mixer: (its name in layer_types, in the fields of its residual weights)
_KINDS = {
    "transnormer_llm": ("linear_attention", "linear_attn"),
    "attention": ("full_attention", "full_attn"),
}
_LIGHTNING = {
    "slopes": "minimax",
    "value_activation": "silu",
    "gate_activation": "sigmoid",
    "norm": "rms_norm",
}


def _model_config(config):
    parts.refuse_unless(config, hidden_act="silu")
    config = config.with_defaults(rope_theta=1e6, max_position_embeddings=131_072)
    D, L, H = (
        config.integer("hidden_size", 4096),
        config.integer("num_hidden_layers", 32),
        config.integer("num_attention_heads", 32),
    )
    K = config.integer("head_dim", max(D // H, 1))
    options = {
        "transnormer_llm": {"num_heads": H, "head_dim": K, **_LIGHTNING},
        "attention": {
            "num_heads": H,
            "num_kv_heads": config.integer("num_key_value_heads", 8),
            "head_dim": K,
            "window": config.optional_integer("sliding_window"),
            **decoder.rope_options(config),
        },
    }
    mixer_of = {kind: mixer for mixer, (kind, _) in _KINDS.items()}
    default = [
        _KINDS["attention"][0] if i % 2 == 0 else _KINDS["transnormer_llm"][0] for i in range(L)
    ]
    specs = []
    for kind in config.strings("layer_types", L, default):
        if kind not in mixer_of:
            raise ValueError(
                f"{config.name}: layer_types has {kind!r}; choose of {', '.join(mixer_of)}"
            )
        name = mixer_of[kind]
        specs.append(
            parts.spec(
                name,
                **options[name],
                mixer_residual=_weights(config, _KINDS[name][1]),
                channel_residual=_weights(config, "mlp"),
            )
        )
    experts = parts.spec(
        "moe",
        num_experts=parts.expert_count(config, "num_local_experts", 8),
        experts_per_token=config.integer("num_experts_per_tok", 2),
        d_ff=config.integer("intermediate_size", 14_336),
    )
    return {
        "vocab_size": config.integer("vocab_size", 32_000),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text(specs),
        "channel_mixer": to_text([experts]),
        "norm_position": "residual",
        "norm_eps": config.positive("rms_norm_eps", 1e-5),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    }


def _weights(config, which):
    """(a, b) of x <- a x + b f(x)."""
    return tuple(config.number(f"{which}_{name}_factor", 1.0) for name in ("alpha", "beta"))


def _hf_config(model, specs):
    parts.only(specs, *_KINDS)
    experts = _experts(model)
    softmax = [layer for layer in specs if layer.name == "attention"]
    attention = decoder.option_values(softmax[0] if softmax else parts.spec("attention"))
    H = attention["num_heads"] if softmax else decoder.option_values(specs[0])["num_heads"]
    fields = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "intermediate_size": parts.given({"d_ff": experts.d_ff or model.get("d_ff")}, "d_ff"),
        "num_hidden_layers": model["num_layers"],
        "layer_types": [_KINDS[layer.name][0] for layer in specs],
        "num_attention_heads": H,
        "num_key_value_heads": attention["num_kv_heads"] or H,
        "head_dim": decoder.option_values(specs[0])["head_dim"] or model["d_model"] // H,
        "sliding_window": attention["window"],
        "max_position_embeddings": attention["max_length"],
        **decoder.rope_fields(attention),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "hidden_act": "silu",
        "rms_norm_eps": model.get("norm_eps", 1e-5),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }
    for layer in specs:
        for which, option in ((_KINDS[layer.name][1], "mixer"), ("mlp", "channel")):
            a, b = dict(layer.options).get(f"{option}_residual", (1.0, 1.0))
            fields |= {f"{which}_alpha_factor": a, f"{which}_beta_factor": b}
    return fields


def _experts(model) -> channel_mixers.MixtureOfExperts:
    module = channel_mixers.make(model.get("channel_mixer") or "swiglu", parent=None)
    if not isinstance(module, channel_mixers.MixtureOfExperts):
        raise ValueError("this layout needs channel_mixer='moe(...)'")
    return module


def _rules(model, specs):
    count = _experts(model).num_experts
    yield from parts.ends(model, "model.embed_tokens", "model.norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield parts.norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm")
        yield parts.norm(f"{theirs}.post_attention_layernorm", f"{ours}/channel_norm")
        if layer.name == "attention":
            yield from decoder.attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from _lightning(model, layer, f"{theirs}.self_attn", f"{ours}/mixer")
        theirs, ours = f"{theirs}.block_sparse_moe", f"{ours}/channel_mixer"
        yield rules.transposed(f"{theirs}.gate.weight", f"{ours}/router/kernel")
        yield from parts.experts(f"{theirs}.experts", ours, count, ("w1", "w3", "w2"))


def _lightning(model, layer, theirs, ours):
    options = decoder.option_values(layer)
    H = options["num_heads"]
    K = options["head_dim"] or model["d_model"] // H
    yield from parts.packed_heads(f"{theirs}.qkv_proj", ours, H, dict.fromkeys("qkv", K))
    yield from parts.linears(theirs, ours, {"output_gate": "u", "out_proj": "o"})
    yield parts.norm(f"{theirs}.norm", f"{ours}/o_norm")


ARCHITECTURE = Architecture(
    model_type="minimax",
    class_name="MiniMaxForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    # Tables of the fixed decay, made from the layer's number.
    ignored=(
        *decoder.IGNORED,
        r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",
    ),
)
