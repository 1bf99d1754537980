"""The test inputs of `softmax_attention`, and the kinds of call with which it is checked."""

from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import OperatorCase, checked_dtype


def _inputs(rng, shape, regime):
    B, T, H, G = shape.B, shape.T, shape.H, shape.key_heads
    sizes = {"q": (B, T, H, shape.K), "k": (B, T, G, shape.K), "v": (B, T, G, shape.V)}
    return {name: regimes.normal(rng, *size) for name, size in sizes.items()}


def _kind_of(*, q, v, visibility):
    kind = "causal" if visibility.causal else "full"
    kind += "" if visibility.window is None else " window"
    kind += "" if visibility.q_segment_BT is None else " packed"
    return kind, checked_dtype(q, v)


CASE = OperatorCase(
    positional=("q", "k", "v"),
    inputs=_inputs,
    kinds=tuple(
        a + b + c for a in ("causal", "full") for b in ("", " window") for c in ("", " packed")
    ),
    kind_of=_kind_of,
    options=lambda kind, shape: {
        "causal": kind.startswith("causal"),
        "window": shape.window if "window" in kind else None,
    },
    packed=lambda kind: kind.endswith("packed"),
    regimes=(),  # its suite is its own: it has no state
    rounded=("q", "k", "v"),
    letters="BHGKV",
    float16=("cudnn",),
)
