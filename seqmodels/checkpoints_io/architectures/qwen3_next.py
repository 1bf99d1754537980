"""Qwen3-Next (Qwen team, 2025): three Gated DeltaNets to one gated softmax attention, and a mixture
of experts in every layer."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, decoder, parts
from seqmodels.modules import channel_mixers
from seqmodels.modules.pattern import to_text

_NORM = "zero_centred_rms_norm"
_TYPES = ("linear_attention", "full_attention")


def _model_config(config):
    parts.refuse_unless(config, hidden_act="silu")
    config = config.with_defaults(max_position_embeddings=32_768)
    L, eps = config.integer("num_hidden_layers", 48), config.positive("rms_norm_eps", 1e-6)
    K = config.integer("linear_key_head_dim", 128)
    recurrent = {
        "num_heads": config.integer("linear_num_key_heads", 16),
        "num_v_heads": config.integer("linear_num_value_heads", 32),
        "head_dim": K,
        "expand_v": config.integer("linear_value_head_dim", 128) / K,
        "conv_width": config.integer("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
    }
    attention = {
        "num_heads": config.integer("num_attention_heads", 16),
        "num_kv_heads": config.integer("num_key_value_heads", 2),
        "head_dim": config.integer("head_dim", 256),
        **decoder.rope_options(config, 0.25),
        "qk_norm": _NORM,
        "norm_eps": eps,
        "use_bias": config.flag("attention_bias", False),
        "output_gate": True,
    }
    interval = config.integer("full_attention_interval", 4)
    types = [_TYPES[(i + 1) % interval == 0] for i in range(L)]
    types = config.strings("layer_types", L, types)
    if unknown := set(types) - set(_TYPES):
        raise ValueError(
            f"{config.name}: layer_types has {unknown.pop()!r}; choose of {', '.join(_TYPES)}"
        )
    dense = _dense_layers(config, L)
    specs = []
    for i, kind in enumerate(types):
        own = {"channel_mixer": "swiglu"} if i in dense and len(dense) < L else {}
        name, options = (
            ("gated_delta_net", recurrent) if kind == _TYPES[0] else ("attention", attention)
        )
        specs.append(parts.spec(name, **options, **own))
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": config.integer("hidden_size"),
        "num_layers": L,
        "pattern": to_text(specs),
        "channel_mixer": "swiglu" if len(dense) == L else _experts_text(config),
        "d_ff": config.integer("intermediate_size", 5632),
        "norm": _NORM,
        "norm_eps": eps,
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    }


def _dense_layers(config, L):
    listed = parts.listed(config, "mlp_only_layers", int)
    step = config.integer("decoder_sparse_step", 1)
    return {i for i in range(L) if i in listed or (i + 1) % step}


def _experts_text(config):
    layer = parts.spec(
        "moe",
        num_experts=parts.expert_count(config, "num_experts", 512),
        experts_per_token=config.integer("num_experts_per_tok", 10),
        d_ff=config.integer("moe_intermediate_size", 512),
        normalize=config.flag("norm_topk_prob", True),
        shared_d_ff=config.integer("shared_expert_intermediate_size", 512),
    )
    return to_text([layer])


def _hf_config(model, specs):
    parts.only(specs, "gated_delta_net", "attention")
    recurrent = parts.options_of(specs, "gated_delta_net")
    softmax = [layer for layer in specs if layer.name == "attention"]
    attention = decoder.option_values(softmax[0] if softmax else parts.spec("attention"))
    K, H = parts.given(recurrent, "head_dim"), attention["num_heads"]
    fields = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "intermediate_size": parts.given(model, "d_ff"),
        "num_hidden_layers": model["num_layers"],
        "layer_types": [_TYPES[layer.name == "attention"] for layer in specs],
        "linear_num_key_heads": recurrent["num_heads"],
        "linear_num_value_heads": recurrent["num_v_heads"] or recurrent["num_heads"],
        "linear_key_head_dim": K,
        "linear_value_head_dim": round(K * recurrent["expand_v"]),
        "linear_conv_kernel_dim": recurrent["conv_width"],
        "num_attention_heads": H,
        "num_key_value_heads": attention["num_kv_heads"] or H,
        "head_dim": attention["head_dim"] or model["d_model"] // H,
        "max_position_embeddings": attention["max_length"],
        **decoder.rope_fields(attention, partial=True),
        "attention_bias": attention["use_bias"],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "rms_norm_eps": model.get("norm_eps", 1e-5),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }
    mixed = [_channels(model, layer) for layer in specs]
    fields["mlp_only_layers"] = [i for i, experts in enumerate(mixed) if experts is None]
    experts = next((e for e in mixed if e is not None), None)
    if experts is not None:
        fields |= {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.normalize,
            "shared_expert_intermediate_size": experts.shared_d_ff,
        }
    return fields


def _channels(model, layer) -> channel_mixers.MixtureOfExperts | None:
    """The layer's experts, or None where it has a SwiGLU."""
    text = dict(layer.options).get("channel_mixer", model.get("channel_mixer", "swiglu"))
    module = channel_mixers.make(text, parent=None)
    return module if isinstance(module, channel_mixers.MixtureOfExperts) else None


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield parts.norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm")
        yield parts.norm(f"{theirs}.post_attention_layernorm", f"{ours}/channel_norm")
        if layer.name == "attention":
            yield from _attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from _gated_delta_net(layer, f"{theirs}.linear_attn", f"{ours}/mixer")
        theirs, ours = f"{theirs}.mlp", f"{ours}/channel_mixer"
        experts = _channels(model, layer)
        if experts is None:
            yield from parts.gated_mlp(theirs, ours)
            continue
        yield rules.transposed(f"{theirs}.gate.weight", f"{ours}/router/kernel")
        names = ("gate_proj", "up_proj", "down_proj")
        yield from parts.experts(f"{theirs}.experts", ours, experts.num_experts, names)
        yield from parts.gated_mlp(f"{theirs}.shared_expert", f"{ours}/shared")
        yield rules.transposed(f"{theirs}.shared_expert_gate.weight", f"{ours}/shared_gate/kernel")


def _attention(layer, theirs, ours):
    options = decoder.option_values(layer)
    H, K, bias = options["num_heads"], options["head_dim"], options["use_bias"]
    yield from parts.packed_heads(f"{theirs}.q_proj", ours, H, {"q": K, "g": K}, bias)
    yield from parts.linears(theirs, ours, {"k_proj": "k", "v_proj": "v", "o_proj": "o"}, bias)
    for name in ("q_norm", "k_norm"):
        yield parts.norm(f"{theirs}.{name}", f"{ours}/{name}")


def _gated_delta_net(layer, theirs, ours):
    options = decoder.option_values(layer)
    G, K = options["num_heads"], options["head_dim"]
    r = (options["num_v_heads"] or G) // G
    value = r * round(K * options["expand_v"])
    widths = {"q": K, "k": K, "v": value, "g": value}
    yield from parts.packed_heads(f"{theirs}.in_proj_qkvz", ours, G, widths)
    yield from parts.packed_heads(f"{theirs}.in_proj_ba", ours, G, {"b": r, "a": r})
    channels = {"q_conv": G * K, "k_conv": G * K, "v_conv": G * value}
    yield from parts.packed_conv1d(f"{theirs}.conv1d", ours, channels)
    for name in ("A_log", "dt_bias"):
        yield rules.same(f"{theirs}.{name}", f"{ours}/decay/{name}")
    yield parts.norm(f"{theirs}.norm", f"{ours}/o_norm")
    yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o")


ARCHITECTURE = Architecture(
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    # Multi-token prediction is a head of its own, which decoding without speculation does not use.
    ignored=(*decoder.IGNORED, r"mtp\..*"),
)
