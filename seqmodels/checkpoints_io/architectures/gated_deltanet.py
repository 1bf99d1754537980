"""Gated DeltaNet (arXiv 2412.06464) checkpoints, in flash-linear-attention's layout."""

from seqmodels.checkpoints_io.architectures import HFConfig, fla, parts

_TABLE = (
    parts.Field("num_heads", "num_heads", HFConfig.integer, 6),
    parts.Field("head_dim", "head_dim", HFConfig.integer, 256),
    parts.Field("expand_v", "expand_v", HFConfig.positive, 2.0),
    *fla.delta_fields(use_gate=True),
)


def _options(config):
    heads = config.options(_TABLE)["num_heads"]
    return {"num_v_heads": config.integer("num_v_heads", heads)}


def _fields(options, d_model):
    return {"num_v_heads": options["num_v_heads"] or options["num_heads"]}


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvabo" + "g" * options["use_gate"])
    yield from fla.short_convs(theirs, ours)
    yield from parts.same(theirs, f"{ours}/decay", {"A_log": "A_log", "dt_bias": "dt_bias"})
    yield parts.norm(f"{theirs}.o_norm", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "gated_deltanet",
    "GatedDeltaNetForCausalLM",
    "gated_delta_net",
    _TABLE,
    _tensors,
    {"use_short_conv": True},
    options=_options,
    fields=_fields,
)
