"""Qwen3-Next (Qwen team, 2025) checkpoints: three Gated DeltaNet layers to one of gated softmax
attention, and a mixture of experts in every layer."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import to_text

_NORM = "zero_centred_rms_norm"
_TYPES = ("linear_attention", "full_attention")
_MIXERS = dict(zip(_TYPES, ("gated_delta_net", "attention")))
_MODEL = (
    *parts.model_fields("rms_norm_eps", num_layers=48, norm_eps=1e-6),
    parts.Field("intermediate_size", "d_ff", HFConfig.integer, 5632),
)
_DELTA_NET = (
    parts.Field("linear_num_key_heads", "num_heads", HFConfig.integer, 16),
    parts.Field("linear_num_value_heads", "num_v_heads", HFConfig.integer, 32),
    parts.Field("linear_key_head_dim", "head_dim", HFConfig.integer, 128),
    parts.Field("linear_conv_kernel_dim", "conv_width", HFConfig.integer, 4),
)
_EXPERTS = (
    parts.Field("num_experts", "num_experts", HFConfig.integer, 512),
    parts.Field("num_experts_per_tok", "experts_per_token", HFConfig.integer, 10),
    parts.Field("moe_intermediate_size", "d_ff", HFConfig.integer, 512),
    parts.Field("norm_topk_prob", "normalize", HFConfig.flag, True),
    parts.Field("shared_expert_intermediate_size", "shared_d_ff", HFConfig.integer, 512),
)


def _model_config(config):
    config.require(hidden_act="silu")
    config = config.with_defaults(max_position_embeddings=32_768)
    model, recurrent = config.options(_MODEL), config.options(_DELTA_NET)
    L, eps = model["num_layers"], model["norm_eps"]
    value_dim = config.integer("linear_value_head_dim", 128)
    recurrent |= {"expand_v": value_dim / recurrent["head_dim"], "norm_eps": eps}
    softmax = decoder.attention_options(
        config,
        heads=16,
        kv_heads=2,
        head_dim=256,
        rotated=0.25,
        qk_norm=_NORM,
        norm_eps=eps,
        use_bias=config.flag("attention_bias", False),
        output_gate=True,
    )
    options = dict(zip(_TYPES, (recurrent, softmax)))
    interval = config.integer("full_attention_interval", 4)
    default = [_TYPES[(i + 1) % interval == 0] for i in range(L)]
    # A layer with a SwiGLU says so, unless all have one.
    dense = _dense_layers(config, L)
    channels = {i: "swiglu" for i in dense if len(dense) < L}
    specs = [
        parts.spec(_MIXERS[kind], **options[kind], channel_mixer=channels.get(i))
        for i, kind in enumerate(config.layer_types(default, _TYPES))
    ]
    return model | {
        "pattern": to_text(specs),
        "channel_mixer": "swiglu" if len(dense) == L else parts.experts_text(config, _EXPERTS),
        "norm": _NORM,
    }


def _dense_layers(config, L):
    """Returns the indices of layers with a SwiGLU in place of a mixture of experts."""
    listed = config.listed("mlp_only_layers", int)
    step = config.integer("decoder_sparse_step", 1)
    return {i for i in range(L) if i in listed or (i + 1) % step}


def _hf_config(model, specs):
    parts.only(specs, *_MIXERS.values())
    recurrent = parts.options_of(specs, "gated_delta_net")
    softmax = parts.options_of(specs, "attention", optional=True)
    recurrent["num_v_heads"] = recurrent["num_v_heads"] or recurrent["num_heads"]
    experts = [_experts(model, layer) for layer in specs]
    some = next((e for e in experts if e is not None), None)
    return {
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(recurrent, _DELTA_NET),
        "linear_value_head_dim": round(parts.given(recurrent, "head_dim") * recurrent["expand_v"]),
        **decoder.attention_fields(softmax, model["d_model"], partial=True),
        "attention_bias": softmax["use_bias"],
        "layer_types": [_TYPES[layer.name == "attention"] for layer in specs],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, found in enumerate(experts) if found is None],
        "hidden_act": "silu",
        **({} if some is None else parts.fields_of(vars(some), _EXPERTS)),
    }


def _experts(model, layer):
    """Returns a layer's MixtureOfExperts module, or None if the layer has a SwiGLU instead."""
    return parts.experts_of(dict(layer.options).get("channel_mixer", model["channel_mixer"]))


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.norm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "input_layernorm", "post_attention_layernorm")
        if layer.name == "attention":
            yield from _attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from _gated_delta_net(layer, f"{theirs}.linear_attn", f"{ours}/mixer")
        theirs, ours = f"{theirs}.mlp", f"{ours}/channel_mixer"
        experts = _experts(model, layer)
        if experts is None:
            yield from parts.linears(theirs, ours, parts.MLP)
            continue
        yield rules.transposed(f"{theirs}.gate.weight", f"{ours}/router/kernel")
        yield from parts.experts(f"{theirs}.experts", ours, experts.num_experts, tuple(parts.MLP))
        yield from parts.linears(f"{theirs}.shared_expert", f"{ours}/shared", parts.MLP)
        yield rules.transposed(f"{theirs}.shared_expert_gate.weight", f"{ours}/shared_gate/kernel")


def _attention(layer, theirs, ours):
    options = parts.option_values(layer)
    H, K, bias = options["num_heads"], options["head_dim"], options["use_bias"]
    yield from parts.packed_heads(f"{theirs}.q_proj", ours, H, {"q": K, "g": K}, bias)
    yield from parts.linears(theirs, ours, {"k_proj": "k", "v_proj": "v", "o_proj": "o"}, bias)
    for name in ("q_norm", "k_norm"):
        yield parts.norm(f"{theirs}.{name}", f"{ours}/{name}")


def _gated_delta_net(layer, theirs, ours):
    options = parts.option_values(layer)
    G, K = options["num_heads"], options["head_dim"]
    r = (options["num_v_heads"] or G) // G
    value = r * round(K * options["expand_v"])
    widths = {"q": K, "k": K, "v": value, "g": value}
    yield from parts.packed_heads(f"{theirs}.in_proj_qkvz", ours, G, widths)
    yield from parts.packed_heads(f"{theirs}.in_proj_ba", ours, G, {"b": r, "a": r})
    channels = {"q_conv": G * K, "k_conv": G * K, "v_conv": G * value}
    yield from rules.packed(f"{theirs}.conv1d", ours, channels, move=rules.CONV1D)
    yield from parts.same(theirs, f"{ours}/decay", {"A_log": "A_log", "dt_bias": "dt_bias"})
    yield parts.norm(f"{theirs}.norm", f"{ours}/o_norm")
    yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o")


ARCHITECTURE = Architecture(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    _model_config,
    _hf_config,
    _rules,
    # Multi-token prediction is a head of its own, which decoding without speculation does not use.
    ignored=(*Architecture.ignored, r"mtp\..*"),
)
