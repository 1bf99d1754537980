"""HGRN2 (arXiv 2404.07904) checkpoints, in flash-linear-attention's layout."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import fla, parts

_NORM_EPS = 1e-5  # of the output norm, whatever the field norm_eps says


def _options(config):
    D = config.integer("hidden_size", 2048)
    heads = config.optional_integer("num_heads")
    ratio = config.integer("expand_ratio", D // heads if heads else 128)
    return {"expand_ratio": ratio, "norm_eps": _NORM_EPS}


def _fields(options, d_model):
    ratio = options["expand_ratio"]
    return {"expand_ratio": ratio, "num_heads": d_model // ratio}


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qfio")
    yield parts.norm(f"{theirs}.g_norm", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "hgrn2",
    "HGRN2ForCausalLM",
    "hgrn2",
    (),
    _tensors,
    {"use_short_conv": False, "use_lower_bound": True, "elementwise_affine": True},
    options=_options,
    fields=_fields,
    extra=lambda: [rules.same("model.lower_bounds", "lower_bounds")],
)
