"""Matrix products with float32 results, forward and backward, and sums over the last axis."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import dtypes
from kernels_pallas.common.dtypes import custom_vjp


@custom_vjp(0)
def einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes an einsum of x and y in float32 or wider, and its gradients in the same way.

    Two bfloat16 operands, which are then a caller's inputs, go to the matrix unit as they are. If
    one is float32 (a decayed key, a score, a state, a cotangent), the product is in float32:
    rounding that operand would cost up to 3e-2 of the result's rms where entries are heavy-tailed.
    The precision of float32 products is `jax_default_matmul_precision`, as everywhere in JAX. Each
    letter of an operand must stand in the other operand or in the result. Cotangents have the dtype
    of their operand.
    """
    accumulate = dtypes.common(x.dtype, y.dtype, jnp.float32)

    def narrow(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=accumulate)

    def wide(x, y):
        return jnp.einsum(subscripts, x.astype(accumulate), y.astype(accumulate))

    if x.dtype != y.dtype or x.dtype == accumulate:
        return wide(x, y)
    # XLA's CPU backend refuses some bfloat16 products with a float32 result; widening gives the
    # same numbers.
    return jax.lax.platform_dependent(x, y, cpu=wide, default=narrow)


def _forward(subscripts, x, y):
    return einsum(subscripts, x, y), (x, y)


def _backward(subscripts, operands, cotangent):
    x, y = operands
    inputs, output = subscripts.split("->")
    x_letters, y_letters = inputs.split(",")
    dx = einsum(f"{output},{y_letters}->{x_letters}", cotangent, y)
    dy = einsum(f"{output},{x_letters}->{y_letters}", cotangent, x)
    return dx.astype(x.dtype), dy.astype(y.dtype)


einsum.defvjp(_forward, _backward)


def sum_last(x: jax.Array) -> jax.Array:
    """Sums over the last axis and keeps it with size 1: (..., K) to (..., 1).

    On CPU it is a product with ones, which is faster there than XLA's reduction of the last axis
    (docs/results.md).
    """
    return _sum_last(x.shape[-1], x)


@custom_vjp(0)
def _sum_last(width, x):
    def product(x):
        wide = x.astype(dtypes.common(x.dtype, jnp.float32))
        ones = jnp.ones((width, 1), wide.dtype)
        return jnp.matmul(wide, ones, precision="highest").astype(x.dtype)

    def plain(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    return jax.lax.platform_dependent(x, cpu=product, default=plain)


# No residuals: a scan differentiated twice forgets an array of which only the shape is used.
_sum_last.defvjp(
    lambda width, x: (_sum_last(width, x), None),
    lambda width, _, cotangent: (jnp.broadcast_to(cotangent, (*cotangent.shape[:-1], width)),),
)


def cleared(x_BTHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x with 0 in place of NaN and Inf, and a mask (B, T, H) of where those were.

    x_BTHK may also be (B, T, H); with a last axis the mask is True where any of its entries is bad.
    """
    finite = jnp.isfinite(x_BTHK)
    bad_BTH = ~finite
    if x_BTHK.ndim == 4:  # as a product, as sums of rows are
        bad_BTH = ~jnp.isfinite(sum_last(jax.lax.stop_gradient(x_BTHK) * 0))[..., 0]
    return jnp.where(finite, x_BTHK, 0), bad_BTH


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x * scale, broadcast; if scale is (..., 1), its gradient is summed by `sum_last`."""
    if scale.shape[-1] > 1:
        return dtypes.multiply(x, scale)
    return _rows_scaled(x, jnp.broadcast_to(scale, (*x.shape[:-1], 1)))


@jax.custom_vjp
def _rows_scaled(x, scale):
    return dtypes.multiply(x, scale)


def _rows_scaled_backward(operands, cotangent):
    x, scale = operands
    d_scale = sum_last(dtypes.multiply(cotangent, x))
    return dtypes.multiply(cotangent, scale).astype(x.dtype), d_scale.astype(scale.dtype)


_rows_scaled.defvjp(lambda x, scale: (dtypes.multiply(x, scale), (x, scale)), _rows_scaled_backward)
