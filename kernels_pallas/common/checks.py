"""Optional checks of the values in arrays, off by default; shapes are always checked.

They are on if the environment variable SEQMODELS_CHECKS is 1, or inside `with checks.enabled():`.
The setting is read when a call is traced: a function compiled with the checks off stays without
them.
"""

import contextlib
import contextvars
import os

import jax
import jax.numpy as jnp
from jax import core

_ON = contextvars.ContextVar("checks", default=os.environ.get("SEQMODELS_CHECKS") == "1")


@contextlib.contextmanager
def enabled(on: bool = True):
    """Context manager: turns checks of values on (or off) for calls made, or traced, inside."""
    token = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(token)


def not_positive(operator: str, name: str, array: jax.Array) -> None:
    """Raises ValueError, if checks are on, where a real array has an entry above 0 or NaN.

    -inf is legal. A concrete array raises at once; a traced one when the compiled program runs, as
    JAX's runtime error with the same message in it.
    """
    if not _ON.get():
        return

    def raise_if_positive(largest):
        if not (largest <= 0).all():
            raise ValueError(
                f"{operator}: {name} must be <= 0 everywhere, its largest value is {float(largest.max()):g}; "
                "pass the logarithm of a decay in [0, 1], such as -softplus(x) or log_sigmoid(x)"
            )

    largest = jnp.max(array)
    if isinstance(largest, core.Tracer):
        jax.debug.callback(raise_if_positive, largest)
    else:
        raise_if_positive(largest)
