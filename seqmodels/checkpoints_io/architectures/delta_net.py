"""DeltaNet (arXiv 2406.06484) checkpoints, in flash-linear-attention's layout."""

from seqmodels.checkpoints_io.architectures import fla, parts


def _options(config):
    D, H = config.integer("hidden_size", 2048), config.integer("num_heads", 16)
    key = int(D * config.positive("expand_k", 1.0))
    value = int(D * config.positive("expand_v", 1.0))
    if key < H or key % H or value % H:
        raise ValueError(
            f"{config.name}: num_heads {H} must divide the key width {key} and the value width {value}"
        )
    return {"num_heads": H, "head_dim": key // H, "expand_v": value / key}


def _fields(options, d_model):
    H, K = options["num_heads"], parts.given(options, "head_dim")
    return {
        "num_heads": H,
        "expand_k": H * K / d_model,
        "expand_v": H * round(K * options["expand_v"]) / d_model,
    }


def _tensors(options, theirs, ours):
    yield from fla.projections(theirs, ours, "qkvbo" + "g" * options["use_gate"])
    yield from fla.short_convs(theirs, ours)
    yield parts.norm(f"{theirs}.o_norm", f"{ours}/o_norm")


ARCHITECTURE = fla.architecture(
    "delta_net",
    "DeltaNetForCausalLM",
    "delta_net",
    fla.delta_fields(use_gate=False),
    _tensors,
    {"use_short_conv": True, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"},
    options=_options,
    fields=_fields,
)
