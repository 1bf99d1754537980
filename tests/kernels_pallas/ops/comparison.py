"""Comparing results with the truth, position by position, and what is compared.

The error at a position: the rms of the difference over the last axis (a head's vector; for arrays
of rank below 4, gates and the like, each entry is a position of its own), divided by the rms of the
whole true tensor. Its maximum over all positions counts, so a single wrong token cannot hide in an
average. The scale is each tensor's own: where a decay of -50 per token leaves a gradient of 1e-21,
it is that gradient that must be right to five digits. Where truth is zero everywhere, the result
must be zero exactly; where its rms lies below 1e-30, float32 (which ends at 1e-38) has no digits
left to compare, and 1e-30 is the scale. A tensor that comes back in bfloat16 is allowed, on top of
the tolerance, what writing the truth itself in bfloat16 costs at its worst position.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
SMALLEST_SCALE = 1e-30


def position_error(got, truth) -> float:
    """Returns the largest error of `got` at any position, relative to the rms of `truth`."""
    wide = np.complex128 if np.iscomplexobj(truth) else np.float64
    got, truth = np.asarray(got).astype(wide), np.asarray(truth).astype(wide)
    assert got.shape == truth.shape, f"{got.shape} is not {truth.shape}"
    if not np.isfinite(got).all():
        return np.inf
    square = np.abs(got - truth) ** 2
    error = np.sqrt(np.mean(square, axis=-1) if truth.ndim >= 4 else square).max()
    scale = np.sqrt(np.mean(np.abs(truth) ** 2))
    if scale == 0.0:
        return 0.0 if error == 0.0 else np.inf
    return float(error / max(scale, SMALLEST_SCALE))


def assert_close(got: dict, truth: dict, tolerance: float) -> None:
    """Asserts that each named tensor is within `tolerance` of the truth at every position."""
    assert got.keys() == truth.keys()
    errors = {name: position_error(got[name], truth[name]) for name in truth}
    wrong = {
        name: f"{error:.2e}"
        for name, error in errors.items()
        if not error < tolerance + _own_rounding(got[name].dtype, truth[name])
    }
    assert not wrong, f"error at a position above {tolerance:g} of the tensor's rms: {wrong}"


def _own_rounding(dtype, truth) -> float:
    """Returns the error of the truth itself when written in bfloat16; 0 for other dtypes."""
    if dtype != jnp.bfloat16:
        return 0.0
    return position_error(np.asarray(truth).astype(dtype), truth)


def cotangents_of(output, final, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns random cotangents of an output and a final state, in float32 or complex64."""
    rng = np.random.default_rng(seed)

    def normal(x):
        real = rng.standard_normal(x.shape).astype(np.float32)
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            return real
        return real + 1j * rng.standard_normal(x.shape).astype(np.float32)

    return normal(output), normal(final)


def over_time(inputs: dict, take: Callable) -> dict:
    """Returns inputs with `take` applied to those that have a time axis (axis 1), not the state."""
    return {
        name: take(x) if name != "initial_state" and x.ndim >= 3 else x
        for name, x in inputs.items()
    }


def documents(B: int, T: int, seed: int = 0) -> np.ndarray:
    """Returns segment ids (B, T) with boundaries of all kinds; row 0 is a single document.

    Documents of one token, boundaries at chunk edges, and ids that come back are among them.
    """
    rng = np.random.default_rng(seed)
    ids = np.ones((B, T), np.int32)
    for b in range(1, B):
        cuts = {0, 1, 16, 17, 64, 65, 128} | set(rng.integers(0, T, 3).tolist())
        starts = np.isin(np.arange(T), list(cuts))
        ids[b] = np.cumsum(starts) % 3
    return ids
