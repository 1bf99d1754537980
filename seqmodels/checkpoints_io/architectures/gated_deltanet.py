"""Gated DeltaNet (arXiv 2412.06464), as flash-linear-attention's GatedDeltaNetForCausalLM has it."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import fla, parts


def _options(config):
    H = config.integer("num_heads", 6)
    return {
        "num_heads": H,
        "num_v_heads": config.integer("num_v_heads", H),
        "head_dim": config.integer("head_dim", 256),
        "expand_v": config.positive("expand_v", 2.0),
        "conv_width": config.integer("conv_size", 4),
        "allow_neg_eigval": config.flag("allow_neg_eigval", False),
        "use_gate": config.flag("use_gate", True),
        "norm_eps": config.number("norm_eps", 1e-6),
    }


def _fields(options, d_model):
    return {
        "num_heads": options["num_heads"],
        "num_v_heads": options["num_v_heads"] or options["num_heads"],
        "head_dim": parts.given(options, "head_dim"),
        "expand_v": options["expand_v"],
        "conv_size": options["conv_width"],
        "allow_neg_eigval": options["allow_neg_eigval"],
        "use_gate": options["use_gate"],
    }


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvabo" + "g" * options["use_gate"])
    yield from fla.short_convs(theirs, ours)
    for name in ("A_log", "dt_bias"):
        yield rules.same(f"{theirs}.{name}", f"{ours}/decay/{name}")
    yield parts.norm(f"{theirs}.o_norm", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "gated_deltanet",
    "GatedDeltaNetForCausalLM",
    "gated_delta_net",
    _options,
    _fields,
    _tensors,
    refused={"use_short_conv": True},
)
