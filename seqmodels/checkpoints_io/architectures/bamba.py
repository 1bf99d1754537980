"""Bamba (IBM, Princeton, UIUC, 2024): Mamba-2 layers and a few of softmax attention, each with a
SwiGLU."""

from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, decoder, parts
from seqmodels.modules.pattern import to_text


def _model_config(config):
    parts.refuse_unless(config, hidden_act="silu")
    parts.no_time_step_limit(config)
    config = config.with_defaults(max_position_embeddings=262_144)
    # transformers takes the fraction of rope_parameters alone, and else a half.
    config = HFConfig(config.fields | {"partial_rotary_factor": None}, config.name)
    D, expand = config.integer("hidden_size", 4096), config.integer("mamba_expand", 2)
    heads = config.integer("mamba_n_heads", 128)
    dim = config.get("mamba_d_head", "auto")
    dim = expand * D // heads if dim == "auto" else config.integer("mamba_d_head")
    parts.check_mamba2_width(config, D, expand, heads, dim)
    eps = config.number("rms_norm_eps", 1e-5)
    recurrent = parts.spec(
        "mamba2",
        expand=expand,
        head_dim=dim,
        d_state=config.integer("mamba_d_state", 256),
        num_groups=config.integer("mamba_n_groups", 1),
        conv_width=config.integer("mamba_d_conv", 4),
        use_bias=config.flag("mamba_proj_bias", False),
        conv_bias=config.flag("mamba_conv_bias", True),
        norm_eps=eps,
    )
    H = config.integer("num_attention_heads", 32)
    attention = parts.spec(
        "attention",
        num_heads=H,
        num_kv_heads=config.integer("num_key_value_heads", H),
        head_dim=config.integer("head_dim", max(D // H, 1)),
        use_bias=config.flag("attention_bias", False),
        **decoder.rope_options(config, 0.5),
    )
    L = config.integer("num_hidden_layers", 32)
    softmax = parts.listed(config, "attn_layer_indices", int)
    if softmax and not 0 <= min(softmax) <= max(softmax) < L:
        raise ValueError(f"{config.name}: attn_layer_indices {softmax} are not within {L} layers")
    return {
        "vocab_size": config.integer("vocab_size"),
        "d_model": D,
        "num_layers": L,
        "pattern": to_text([attention if i in softmax else recurrent for i in range(L)]),
        "d_ff": config.integer("intermediate_size"),
        "channel_bias": config.flag("mlp_bias", False),
        "norm_eps": eps,
        "tied_embeddings": config.flag("tie_word_embeddings", False),
    }


def _hf_config(model, specs):
    parts.only(specs, "mamba2", "attention")
    recurrent = parts.options_of(specs, "mamba2")
    softmax = [i for i, layer in enumerate(specs) if layer.name == "attention"]
    # A stack without attention still has fields for it.
    attention = decoder.option_values(specs[softmax[0]] if softmax else parts.spec("attention"))
    H = attention["num_heads"]
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["d_model"],
        "intermediate_size": parts.given(model, "d_ff"),
        "num_hidden_layers": model["num_layers"],
        "attn_layer_indices": softmax,
        "num_attention_heads": H,
        "num_key_value_heads": attention["num_kv_heads"] or H,
        "head_dim": attention["head_dim"] or model["d_model"] // H,
        "max_position_embeddings": attention["max_length"],
        **decoder.rope_fields(attention, partial=True),
        "attention_bias": attention["use_bias"],
        "mlp_bias": model.get("channel_bias", False),
        "mamba_expand": recurrent["expand"],
        "mamba_n_heads": recurrent["expand"] * model["d_model"] // recurrent["head_dim"],
        "mamba_d_head": recurrent["head_dim"],
        "mamba_d_state": recurrent["d_state"],
        "mamba_n_groups": recurrent["num_groups"],
        "mamba_d_conv": recurrent["conv_width"],
        "mamba_proj_bias": recurrent["use_bias"],
        "mamba_conv_bias": recurrent["conv_bias"],
        "hidden_act": "silu",
        "rms_norm_eps": model.get("norm_eps", 1e-5),
        "tie_word_embeddings": model.get("tied_embeddings", True),
    }


def _rules(model, specs):
    yield from parts.ends(model, "model.embed_tokens", "model.final_layernorm")
    for i, layer in enumerate(specs):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield parts.norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm")
        yield parts.norm(f"{theirs}.pre_ff_layernorm", f"{ours}/channel_norm")
        if layer.name == "attention":
            yield from decoder.attention(layer, f"{theirs}.self_attn", f"{ours}/mixer")
        else:
            yield from parts.mamba2(layer, model["d_model"], f"{theirs}.mamba", f"{ours}/mixer")
        bias = model.get("channel_bias", False)
        yield from parts.gated_mlp(f"{theirs}.feed_forward", f"{ours}/channel_mixer", bias)


ARCHITECTURE = Architecture(
    model_type="bamba",
    class_name="BambaForCausalLM",
    model_config=_model_config,
    hf_config=_hf_config,
    rules=_rules,
    ignored=decoder.IGNORED,
)
