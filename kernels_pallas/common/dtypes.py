"""Explicit promotion of dtypes, for programs whose `jax_numpy_dtype_promotion` is "strict"."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def common(*arrays_or_dtypes) -> jnp.dtype:
    """Returns the least dtype that holds all arguments; weakly typed arrays adapt to the others."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays_or_dtypes)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the product x y in the common dtype of both."""
    dtype = common(x, y)
    return x.astype(dtype) * y.astype(dtype)


def custom_vjp(*nondiff_argnums: int) -> Callable[[Callable], Any]:
    """Decorator: `jax.custom_vjp`, given the positions of the arguments that are no arrays."""
    return functools.partial(jax.custom_vjp, nondiff_argnums=nondiff_argnums)
