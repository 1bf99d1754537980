"""Bamba (IBM, Princeton, UIUC, 2024) checkpoints: Mamba-2 and a few softmax attention layers, with
SwiGLUs."""

from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import to_text

_MODEL = (
    *parts.model_fields("rms_norm_eps", d_model=4096, num_layers=32, norm_eps=1e-5),
    parts.D_FF,
    parts.Field("mlp_bias", "channel_bias", HFConfig.flag, False),
)
_MAMBA = (
    parts.Field("mamba_expand", "expand", HFConfig.integer, 2),
    parts.Field("mamba_d_state", "d_state", HFConfig.integer, 256),
    parts.Field("mamba_n_groups", "num_groups", HFConfig.integer, 1),
    parts.Field("mamba_d_conv", "conv_width", HFConfig.integer, 4),
    parts.Field("mamba_proj_bias", "use_bias", HFConfig.flag, False),
    parts.Field("mamba_conv_bias", "conv_bias", HFConfig.flag, True),
)


def _model_config(config):
    config.require(hidden_act="silu")
    parts.no_time_step_limit(config)
    config = config.with_defaults(max_position_embeddings=262_144)
    # transformers takes the fraction of rope_parameters alone, and else a half.
    config = HFConfig(config.fields | {"partial_rotary_factor": None}, config.name)
    model, options = config.options(_MODEL), config.options(_MAMBA)
    D, L, heads = model["d_model"], model["num_layers"], config.integer("mamba_n_heads", 128)
    given = config.get("mamba_d_head", "auto")
    automatic = options["expand"] * D // heads
    options["head_dim"] = automatic if given == "auto" else config.integer("mamba_d_head")
    parts.check_mamba2_width(config, D, options, heads)
    recurrent = parts.spec("mamba2", **options, norm_eps=model["norm_eps"])
    bias = config.flag("attention_bias", False)
    softmax = parts.spec(
        "attention", **decoder.attention_options(config, D, heads=32, rotated=0.5, use_bias=bias)
    )
    indices = config.listed("attn_layer_indices", int)
    if indices and not 0 <= min(indices) <= max(indices) < L:
        raise ValueError(f"{config.name}: attn_layer_indices {indices} are not within {L} layers")
    return model | {"pattern": to_text([softmax if i in indices else recurrent for i in range(L)])}


def _hf_config(model, specs):
    parts.only(specs, "mamba2", "attention")
    recurrent = parts.options_of(specs, "mamba2")
    # A stack without attention still has fields for it.
    softmax = parts.options_of(specs, "attention", optional=True)
    return {
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(recurrent, _MAMBA),
        **decoder.attention_fields(softmax, model["d_model"], partial=True),
        "attention_bias": softmax["use_bias"],
        "attn_layer_indices": [i for i, layer in enumerate(specs) if layer.name == "attention"],
        "mamba_n_heads": recurrent["expand"] * model["d_model"] // recurrent["head_dim"],
        "mamba_d_head": recurrent["head_dim"],
        "hidden_act": "silu",
    }


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.final_layernorm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield from parts.block_norms(theirs, ours, "input_layernorm", "pre_ff_layernorm")
        if layer.name == "attention":
            yield from decoder.attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from parts.mamba2(layer, model["d_model"], f"{theirs}.mamba", f"{ours}/mixer")
        theirs, ours = f"{theirs}.feed_forward", f"{ours}/channel_mixer"
        yield from parts.linears(theirs, ours, parts.MLP, model["channel_bias"])


ARCHITECTURE = Architecture("bamba", "BambaForCausalLM", _model_config, _hf_config, _rules)
