"""Mamba (Gu & Dao, arXiv 2312.00752) checkpoints, as of transformers' MambaForCausalLM."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig, parts
from seqmodels.modules.pattern import to_text

_MODEL = (
    *parts.model_fields("layer_norm_epsilon", norm_eps=1e-5, tied_embeddings=True),
    parts.Field("residual_in_fp32", "float32_residual", HFConfig.flag, True),
)
_MIXER = (
    parts.Field("expand", "expand", HFConfig.integer, 2),
    parts.Field("state_size", "d_state", HFConfig.integer, 16),
    parts.Field("conv_kernel", "conv_width", HFConfig.integer, 4),
    parts.Field("use_bias", "use_bias", HFConfig.flag, False),
    parts.Field("use_conv_bias", "conv_bias", HFConfig.flag, True),
)


def _rank(options, D: int) -> int:
    return options["dt_rank"] or -(-D // 16)


def _model_config(config):
    config.require(hidden_act="silu")
    model = config.options(_MODEL)
    automatic = config.get("time_step_rank", "auto") == "auto"
    rank = None if automatic else config.integer("time_step_rank")
    rank = _rank({"dt_rank": rank}, model["d_model"])
    layer = parts.spec("mamba", **config.options(_MIXER), dt_rank=rank)
    return model | {"pattern": to_text([layer]), "channel_mixer": None}


def _hf_config(model, specs):
    parts.only(specs, "mamba")
    options = parts.options_of(specs, "mamba")
    return {
        **parts.fields_of(model, _MODEL),
        **parts.fields_of(options, _MIXER),
        "intermediate_size": options["expand"] * model["d_model"],
        "time_step_rank": _rank(options, model["d_model"]),
        "hidden_act": "silu",
    }


def _rules(model, specs):
    options = parts.options_of(specs, "mamba")
    E, K = options["expand"] * model["d_model"], options["d_state"]
    features = {"dt_low_rank": _rank(options, model["d_model"]), "B": K, "C": K}
    bias = options["use_bias"]
    yield from parts.ends(model, "backbone.embeddings", "backbone.norm_f")
    for i in range(len(specs)):
        yield parts.norm(f"backbone.layers.{i}.norm", f"block_{i}/mixer_norm")
        theirs, ours = f"backbone.layers.{i}.mixer", f"block_{i}/mixer"
        yield from rules.packed(f"{theirs}.in_proj", ours, {"x": E, "z": E}, bias)
        conv = f"{theirs}.conv1d", f"{ours}/x_conv", options["conv_bias"]
        yield from rules.linear(*conv, rules.CONV1D)
        yield from rules.packed(f"{theirs}.x_proj", ours, features)
        yield rules.transposed(f"{theirs}.dt_proj.weight", f"{ours}/dt/kernel")
        names = {"dt_proj.bias": "dt_bias", "A_log": "A_log", "D": "D"}
        yield from parts.same(theirs, ours, names)
        yield from rules.linear(f"{theirs}.out_proj", f"{ours}/o", bias)


ARCHITECTURE = Architecture(
    "mamba", "MambaForCausalLM", _model_config, _hf_config, _rules, base_prefix="backbone."
)
