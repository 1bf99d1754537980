"""Matrix products inside the TPU kernels of linear attention, rounded alike by the compiler and by
the interpreter.

narrow: the caller's inputs are bfloat16. Then both operands go to the matrix unit in bfloat16 and
sums are float32. Otherwise operands are float32 and products at the highest precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices


class Gradients(NamedTuple):
    """What a chunk's backward pass gives."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: jax.Array | None
    S: jax.Array


def operand(narrow, x):
    """x as a product reads it. Interpreted, a bfloat16 operand is a float32 one that was rounded:
    XLA's CPU backend refuses some bfloat16 products, and drops a conversion there and back, but not
    this operation."""
    if not narrow:
        return x.astype(jnp.float32)
    if not devices.interpreting():
        return x.astype(jnp.bfloat16)
    x = x.astype(jnp.float32)
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def terms(narrow, x):
    """What a product must read to keep 16 bits of x (or all 24): what bfloat16 holds, and the rest."""
    head = operand(narrow, x)
    return (head, operand(narrow, x - head.astype(jnp.float32))) if narrow else (head,)


def dot(narrow, x, y, axes=(1, 0)):
    """x y, summed over axis axes[0] of x and axes[1] of y, in float32."""
    precision = None if narrow and not devices.interpreting() else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        operand(narrow, x),
        operand(narrow, y),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def fine(narrow, x, y, axes=(1, 0)):
    """The same, keeping 16 bits of a float32 operand: for gates' gradients, whose tails are heavy."""
    x_terms, y_terms = ((z,) if z.dtype == jnp.bfloat16 else terms(narrow, z) for z in (x, y))
    products = [
        dot(narrow, a, b, axes)
        for i, a in enumerate(x_terms)
        for j, b in enumerate(y_terms)
        if i + j < 2
    ]
    return sum(products[1:], start=products[0])


def wide(x_X, width):
    """An array whose 128 lanes are equal, with `width` lanes."""
    copies = -(-width // x_X.shape[1])
    x_X = jnp.concatenate([x_X] * copies, axis=1) if copies > 1 else x_X
    return x_X[:, :width]
