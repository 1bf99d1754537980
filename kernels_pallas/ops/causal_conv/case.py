"""The test inputs of `causal_conv`, and the kinds of call with which it is checked."""

import jax.numpy as jnp

from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import OperatorCase


def _inputs(rng, shape, regime):
    """Draws inputs by name for a regime, such as "width 4 bias silu norm" (four taps and a bias).

    Regimes that do not begin with "width" have shape.I taps and a bias.
    """
    B, T, D, words = shape.B, shape.T, shape.width, regime.split()
    taps = int(words[1]) if words[0] == "width" else shape.I
    sizes = {"x": (B, T, D), "w": (taps, D), "initial_state": (B, taps - 1, D)}
    if words[0] != "width" or "bias" in words:
        sizes["bias"] = (D,)
    return {name: regimes.normal(rng, *size) for name, size in sizes.items()}


def _norm_heads(shape):
    return shape.width // shape.V or 2


def _options(kind, shape):
    return {
        "activation": "silu" if "silu" in kind else None,
        "l2_norm_heads": _norm_heads(shape) if "norm" in kind else None,
    }


def _further_calls(kind, shape):
    """Returns, for kinds with an L2 norm, the options of one more call, with heads half as wide."""
    return {" of narrow heads": {"l2_norm_heads": 2 * _norm_heads(shape)}} if "norm" in kind else {}


def _kind_of(*, x_BTD, start_BT, finish, **others):
    words = [finish.activation, finish.heads and "norm", None if start_BT is None else "packed"]
    dtype = "bfloat16" if x_BTD.dtype == jnp.bfloat16 else "float32"
    return " ".join(filter(None, words)) or "sums", dtype


CASE = OperatorCase(
    positional=("x", "w"),
    inputs=_inputs,
    kinds=(
        *("sums", "silu", "norm", "silu norm"),
        *("packed", "silu packed", "norm packed", "silu norm packed"),
    ),
    kind_of=_kind_of,
    options=_options,
    further_calls=_further_calls,
    packed=lambda kind: kind.endswith("packed"),
    regimes=("width 2 silu", "width 4 bias", "width 16", "width 4 bias silu norm"),
    rounded=("x", "w", "bias", "initial_state"),
    unbatched=("w",),
    letters="BDVI",
    truth="shifted",
)
