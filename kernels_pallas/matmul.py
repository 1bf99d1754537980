"""Matrix products in the input's dtype with float32 (or wider) accumulation, in the backward pass too."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """Two-operand einsum: operands rounded to `dtype`, result in promote(dtype, float32).

    The rule autodiff would give multiplies a float32 cotangent with a bfloat16 operand, which no matrix unit does;
    here the cotangent is rounded to `dtype` as well. Each letter of an operand must stand in the other or in the
    result. Cotangents come back in the dtype of their operand. For float32 and float64 this is plain `jnp.einsum`
    (under `jax_default_matmul_precision`, as everywhere in JAX).
    """
    accumulate = jnp.promote_types(dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)

    def narrow(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=accumulate)

    def widened(x, y):
        return jnp.einsum(subscripts, x.astype(accumulate), y.astype(accumulate))

    if accumulate == dtype:
        return narrow(x, y)
    # XLA's CPU backend refuses some bfloat16 products with a float32 result; widening first gives the same numbers.
    return jax.lax.platform_dependent(x, y, cpu=widened, default=narrow)


def _forward(subscripts, x, y, dtype):
    return einsum(subscripts, x, y, dtype), (x, y)


def _backward(subscripts, dtype, operands, cotangent):
    x, y = operands
    inputs, output = subscripts.split("->")
    x_letters, y_letters = inputs.split(",")
    dx = einsum(f"{output},{y_letters}->{x_letters}", cotangent, y, dtype)
    dy = einsum(f"{output},{x_letters}->{y_letters}", cotangent, x, dtype)
    return dx.astype(x.dtype), dy.astype(y.dtype)


einsum.defvjp(_forward, _backward)
