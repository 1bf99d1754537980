"""RetNet (arXiv 2307.08621) checkpoints, in flash-linear-attention's layout."""

from seqmodels.checkpoints_io.architectures import fla, parts


def _options(config):
    fla.require_all_heads(config, 8)
    return {"rope_base": 10_000.0}


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvgo")
    yield parts.norm(f"{theirs}.g_norm_swish_gate", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "retnet",
    "RetNetForCausalLM",
    "retnet",
    fla.head_fields(8, 1.0, 2.0),
    _tensors,
    fla.HEADS_REQUIRED,
    options=_options,
    hidden_ratio=2,
)
