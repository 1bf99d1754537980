"""Mamba-2 (Dao & Gu, arXiv 2405.21060) checkpoints, as of transformers' Mamba2ForCausalLM."""

from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, parts
from seqmodels.modules.pattern import to_text

_MODEL = (
    *parts.model_fields("layer_norm_epsilon", d_model=4096, norm_eps=1e-5),
    parts.Field("residual_in_fp32", "float32_residual", HFConfig.flag, True),
)
_MIXER = (
    parts.Field("expand", "expand", HFConfig.integer, 2),
    parts.Field("head_dim", "head_dim", HFConfig.integer, 64),
    parts.Field("state_size", "d_state", HFConfig.integer, 128),
    parts.Field("n_groups", "num_groups", HFConfig.integer, 8),
    parts.Field("conv_kernel", "conv_width", HFConfig.integer, 4),
    parts.Field("use_bias", "use_bias", HFConfig.flag, False),
    parts.Field("use_conv_bias", "conv_bias", HFConfig.flag, True),
)


def _model_config(config):
    config.require(hidden_act="silu")
    parts.no_time_step_limit(config)
    model, options = config.options(_MODEL), config.options(_MIXER)
    parts.check_mamba2_width(config, model["d_model"], options, config.integer("num_heads", 128))
    layer = parts.spec("mamba2", **options, norm_eps=model["norm_eps"])
    return model | {"pattern": to_text([layer]), "channel_mixer": None}


def _hf_config(model, specs):
    parts.only(specs, "mamba2")
    options = parts.options_of(specs, "mamba2")
    return {
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(options, _MIXER),
        "num_heads": options["expand"] * model["d_model"] // options["head_dim"],
        "hidden_act": "silu",
    }


def _rules(model, specs):
    yield from parts.ends(model, "backbone.embeddings", "backbone.norm_f")
    for i, layer in enumerate(specs):
        theirs = f"backbone.layers.{i}"
        yield parts.norm(f"{theirs}.norm", f"block_{i}/mixer_norm")
        yield from parts.mamba2(layer, model["d_model"], f"{theirs}.mixer", f"block_{i}/mixer")


ARCHITECTURE = Architecture(
    "mamba2", "Mamba2ForCausalLM", _model_config, _hf_config, _rules, base_prefix="backbone."
)
