"""The inverse of I + A, A strictly lower triangular, which couples the tokens of a chunk (WY form).

Powers of A (a Neumann series) are never formed: with entries up to 2 they grow past 1e30 before
they vanish, while the inverse itself stays small. Diagonal blocks of 16 are inverted row by row, by
substitution, and neighbours are joined by block substitution, two matrix products per level:

    [I + A11     0   ]^-1     [X1  0 ]
    [  A21    I + A22]     =  [Y   X2]          Y = -X2 A21 X1

On CPU this takes half the time of `jax.lax.linalg.triangular_solve` (512 matrices of 64 x 64,
jaxlib 0.10.2), and is as exact.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import manual_axes

BLOCK = 16


def inverse(A_CC: jax.Array) -> jax.Array:
    """Returns (I + A)^-1 for A (..., C, C) strictly lower triangular, C a power of two.

    Products have the highest precision. Callers that solve U = (I + A)^-1 R differentiate that by
    hand: dR = (I + A)^-T dU, dA = -dR U^T.
    """
    *lead, C, _ = A_CC.shape
    A_MCC = A_CC.reshape(-1, C, C)
    U = min(C, BLOCK)
    diagonal_MUU = _blocks(A_MCC, U, 0, U)

    # Row i of a block's inverse: e_i - A_i X, from the rows above
    def substitute(i, X_MUU):
        row_M1U = jax.lax.dynamic_slice_in_dim(diagonal_MUU, i, 1, axis=-2)
        known_M1U = jax.lax.dynamic_slice_in_dim(X_MUU, i, 1, axis=-2)
        # As a product: XLA's CPU backend takes longer for the sum over rows (docs/results.md)
        new_M1U = known_M1U - _dot(row_M1U, X_MUU)
        return jax.lax.dynamic_update_slice_in_dim(X_MUU, new_M1U, i, axis=-2)

    eye_MUU = jnp.broadcast_to(jnp.eye(U, dtype=A_CC.dtype), diagonal_MUU.shape)
    eye_MUU = manual_axes.alike(eye_MUU, manual_axes.varying(A_CC))
    X_MUU = jax.lax.fori_loop(1, U, substitute, eye_MUU)
    # Neighbouring blocks joined, level by level
    while U < C:
        first, second = X_MUU[..., 0::2, :, :], X_MUU[..., 1::2, :, :]
        below = -_dot(_dot(second, _blocks(A_MCC, U, U, 2 * U)), first)
        top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
        X_MUU = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
        U *= 2
    return X_MUU.reshape(*lead, C, C)


def _blocks(A_CC, U, down, stride):
    """Returns A's U x U blocks at columns i = 0, stride, 2 stride, ... and rows i + down."""
    starts = range(0, A_CC.shape[-1], stride)
    return jnp.stack([A_CC[..., i + down : i + down + U, i : i + U] for i in starts], axis=-3)


def _dot(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
