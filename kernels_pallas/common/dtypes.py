"""Promotion of dtypes, explicitly: `jax_numpy_dtype_promotion` may be "strict"."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def common(*arrays_or_dtypes) -> jnp.dtype:
    """Returns the least dtype that holds all; a weakly typed array takes that of the others."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays_or_dtypes)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x y in their common dtype."""
    dtype = common(x, y)
    return x.astype(dtype) * y.astype(dtype)


def custom_vjp(*nondiff_argnums: int) -> Callable[[Callable], Any]:
    """Returns `jax.custom_vjp` as a decorator, for functions with arguments that are no arrays."""
    return functools.partial(jax.custom_vjp, nondiff_argnums=nondiff_argnums)
