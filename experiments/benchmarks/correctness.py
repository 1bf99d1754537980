"""Checks implementations before they are timed: a wrong one is reported, and not timed.

Truth is the recurrent definition in float64, on the same rounded inputs and cotangents. The error
at a position is the rms of the difference over the last axis (for arrays of rank below 4: of each
entry), over the rms of the whole true tensor; the largest one counts, so that one wrong token
cannot hide in an average.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.entries import Arrays, BenchmarkEntry, Problem, with_gradients
from kernels_pallas.dispatch.kernel_check import position_error

# On accelerators a float32 product is rounded to TF32 or bfloat16 by default, so the wider
# tolerance holds there.
TOLERANCE = {"float32": 5e-5, "bfloat16": 3e-2}


def tolerance(dtype: str) -> float:
    exact = dtype == "float32" and jax.default_backend() == "cpu"
    return TOLERANCE["float32" if exact else "bfloat16"]


def truth(definition, problem: Problem) -> Arrays:
    """Returns the float64 outputs and gradients of `definition`, a function from dict to dict."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_widen, (problem.inputs, problem.cotangents))
        return jax.tree.map(np.asarray, jax.jit(with_gradients(definition))(*wide))


def errors(entry: BenchmarkEntry, problem: Problem, expected: Arrays) -> dict[str, float]:
    """Returns {output or gradient: largest error at a position} of an entry, against `expected`."""
    forward = entry.prepare(problem, False).run()
    both = entry.prepare(problem, True).run()
    found = {f"{name} (forward)": position_error(x, expected[name]) for name, x in forward.items()}
    return found | {name: position_error(x, expected[name]) for name, x in both.items()}


def wrong(found: dict[str, float], limit: float) -> str | None:
    """Returns the errors that are not below `limit` as text, worst first; None if there are none.

    found: {name of an output or gradient: error}. NaN counts as wrong; at most three are listed.
    """
    bad = sorted(((name, e) for name, e in found.items() if not e < limit), key=lambda x: -x[1])
    if not bad:
        return None
    return ", ".join(f"{name} off by {e:.1e}" for name, e in bad[:3])


def _widen(x):
    return jnp.asarray(np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64))
