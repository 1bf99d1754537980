"""The test inputs of `diagonal_scan`, and the kinds of call with which it is checked."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import OperatorCase


def _inputs(rng, shape, regime):
    """Draws inputs by name for a regime, "complex <law>" or, real, "<law>" or "real <law>".

    <law> is the decays' distribution; one that begins with "log" gives log_decay, not decay.
    """
    B, T, D = shape.B, shape.T, shape.width
    is_complex = regime.startswith("complex")
    law = regime.removeprefix("complex ").removeprefix("real ")
    size = (D,) if law in ("fixed", "log fixed") else (B, T, D)
    turns = 2.0
    if law in ("check", "trained"):
        turns = 1.0
        if law == "check":  # zeros among the decays are what documents are to a kernel
            gate = np.exp(regimes.gate(rng, size, "check"))
        else:
            gate = rng.uniform(0.5, 0.999, size)
    else:
        gate = _gate(rng, law, size, is_complex)
    dtype = np.complex64 if is_complex else np.float32
    if is_complex:
        phase = turns * np.pi * rng.random(size)
        gate = gate + 1j * phase if law.startswith("log") else gate * np.exp(1j * phase)
    name = "log_decay" if law.startswith("log") else "decay"
    # A complex decay with a real x is the usual form of S4D and of an LRU's first layer.
    x_dtype = np.float32 if regime == "complex log fixed" else dtype
    return {
        "x": regimes.normal(rng, B, T, D, dtype=x_dtype),
        name: gate.astype(dtype),
        "initial_state": regimes.normal(rng, B, D, dtype=dtype),
    }


def _gate(rng, law, size, is_complex):
    uniform = rng.random(size)
    match law:
        case "weak":
            return 0.9 + 0.1 * uniform
        case "fixed":
            return np.linspace(-1.0, 0.999, size[-1])
        case "growing":  # to 1e12, and back
            return np.where(np.arange(size[1])[:, None] // 50 % 2 == 0, 1.7, 0.3) + 0.1 * uniform
        case "any sign":
            return np.where(uniform < 0.1, 0.0, 2.2 * rng.random(size) - 1.1)
        case "log fixed":
            # A phase loses one rounding of exp(log_decay) for each token that it reaches back, in
            # any form.
            return -np.linspace(0.1 if is_complex else 0.0, 0.5, size[-1])
        case "log":
            return -np.choose(rng.integers(0, 4, size), [1e-3, 0.3, 4.0, 50.0]) * uniform
        case "log strong":
            return np.full(size, -50.0)
        case "log resets":
            return np.where(uniform < 0.05, -np.inf, -0.1 * uniform)
    raise ValueError(f"unknown law of decays {law!r}")


def _kind_of(*, x_BTD, decay_BTD, **others):
    if jnp.iscomplexobj(decay_BTD):
        return "complex", "float32"
    return "real", "bfloat16" if x_BTD.dtype == jnp.bfloat16 else "float32"


CASE = OperatorCase(
    positional=("x", "decay"),
    inputs=_inputs,
    kinds=("real", "complex"),
    kind_of=_kind_of,
    further_calls=lambda kind, shape: {" in reverse": {"reverse": True}},
    regimes=(
        *("weak", "fixed", "any sign", "growing"),
        *("log fixed", "log", "log strong", "log resets"),
        *("complex weak", "complex growing", "complex any sign"),
        *("complex log fixed", "complex log", "complex log resets"),
    ),
    rounded=("x",),
    letters="BD",
)
