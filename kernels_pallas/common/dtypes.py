"""Arithmetic of arrays of two dtypes, said explicitly: `jax_numpy_dtype_promotion` may be
"strict".
"""

import jax
import jax.numpy as jnp


def common(*arrays_or_dtypes) -> jnp.dtype:
    """The least dtype that holds all of them; an array that comes of a Python number, weakly
    typed, takes the others'.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays_or_dtypes)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in the common dtype."""
    dtype = common(x, y)
    return x.astype(dtype) * y.astype(dtype)
