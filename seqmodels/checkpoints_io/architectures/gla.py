"""Gated linear attention (arXiv 2312.06635), as flash-linear-attention's GLAForCausalLM has it."""

from seqmodels.checkpoints_io import rules
from seqmodels.checkpoints_io.architectures import fla, parts

# Not in its config.json.
_GATE = {"gate_rank": 16, "gate_temperature": 16.0}


def _options(config):
    H = config.integer("num_heads", 4)
    parts.refuse_unless(config, num_kv_heads=H)
    return {
        "num_heads": H,
        "expand_k": config.number("expand_k", 0.5),
        "expand_v": config.number("expand_v", 1.0),
        "norm_eps": config.number("norm_eps", 1e-6),
        **_GATE,
    }


def _fields(options, d_model):
    return {name: options[name] for name in ("num_heads", "expand_k", "expand_v")}


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvgo")
    yield from rules.linear(f"{theirs}.gk_proj.0", f"{ours}/gk_down")
    yield from rules.linear(f"{theirs}.gk_proj.1", f"{ours}/gk_up", bias=True)
    yield parts.norm(f"{theirs}.g_norm_swish_gate", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "gla",
    "GLAForCausalLM",
    "gla",
    _options,
    _fields,
    _tensors,
    refused={
        "fuse_norm": True,  # False has another name for the norm
        "use_short_conv": False,
        "use_output_gate": True,
        "elementwise_affine": True,
        "feature_map": None,
        "clamp_min": None,
        "use_gk": True,
        "use_gv": False,
    },
)
