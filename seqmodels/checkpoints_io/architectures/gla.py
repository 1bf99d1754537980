"""Gated linear attention (arXiv 2312.06635) checkpoints, in flash-linear-attention's layout."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import fla, parts

# Constants of the library's layer, which its config.json does not have.
_GATE = {"gate_rank": 16, "gate_temperature": 16.0}


def _options(config):
    fla.require_all_heads(config, 4)
    return _GATE


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvgo")
    yield from rules.linear(f"{theirs}.gk_proj.0", f"{ours}/gk_down")
    yield from rules.linear(f"{theirs}.gk_proj.1", f"{ours}/gk_up", bias=True)
    yield parts.norm(f"{theirs}.g_norm_swish_gate", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "gla",
    "GLAForCausalLM",
    "gla",
    fla.head_fields(4, 0.5, 1.0),
    _tensors,
    fla.HEADS_REQUIRED | {"clamp_min": None, "use_gk": True, "use_gv": False},
    options=_options,
)
