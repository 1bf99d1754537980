"""RetNet (arXiv 2307.08621), as flash-linear-attention's RetNetForCausalLM has it."""

from seqmodels.checkpoints_io.architectures import fla, parts


def _options(config):
    H = config.integer("num_heads", 8)
    parts.refuse_unless(config, num_kv_heads=H)
    return {
        "num_heads": H,
        "expand_k": config.number("expand_k", 1.0),
        "expand_v": config.number("expand_v", 2.0),
        "rope_base": 10_000.0,
        "norm_eps": config.number("norm_eps", 1e-6),
    }


def _fields(options, d_model):
    return {name: options[name] for name in ("num_heads", "expand_k", "expand_v")}


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvgo")
    yield parts.norm(f"{theirs}.g_norm_swish_gate", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "retnet",
    "RetNetForCausalLM",
    "retnet",
    _options,
    _fields,
    _tensors,
    refused={
        "fuse_norm": True,  # False has another name for the norm
        "use_short_conv": False,
        "use_output_gate": True,
        "elementwise_affine": True,
        "feature_map": None,
    },
    hidden_ratio=2,
)
