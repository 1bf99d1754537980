"""Losses of logits, computed one chunk of time after the other: all logits are never in memory.

The equations stand in docs/math/linear_cross_entropy.md. A chunk ("piece" in the code) is c
consecutive tokens of every row. Forward, a loop over chunks makes the chunk's logits (B, c, W) and
saves its losses. Backward, it makes the logits once more, takes the loss's gradient with respect to
them, and multiplies it with x and with the matrix. Sums over chunks are float32. Time is cut, not
the tokens of all rows, so that rows stay on their devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import chunk_blocks, matmul
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.ops.linear_cross_entropy import reference

LOGITS_OF_A_PIECE = 1 << 27  # half a gigabyte in float32
TOKENS_OF_A_PIECE = (256, 4096)


def heuristic_chunk_size(B: int, T: int, W: int) -> int:
    """Returns how many tokens of each row make a chunk, such that chunks are nearly equal.

    Each chunk reads and writes the matrix's whole gradient, so that fewer than several hundred
    tokens would wait for memory; more than a few thousand gain nothing. In between, the logits of a
    chunk take up to half a gigabyte. A symbolic length or batch is one chunk.
    """
    if not chunk_blocks.known(B, T):
        return T
    low, high = TOKENS_OF_A_PIECE
    tokens = max(low, min(high, LOGITS_OF_A_PIECE // W))
    pieces = -(-T // max(1, tokens // B))
    return -(-T // pieces)


@custom_vjp(0, 1, 2)
def run(loss, layout, chunk_size, x_BTD, matrix, bias_W, per_token, fixed, learned):
    """Computes `loss` of the logits; returns it with its details, (B, T) in float32 or wider.

    `loss` is a `reference.CrossEntropy` or `Divergence`; per_token, fixed and learned are its
    arguments beside the logits. Gradients go to x, the matrix, the bias and `learned`.
    """

    def piece_results(start, size):
        x_BcD, tokens = _cut((x_BTD, per_token), start, size)
        logits_BcW = reference.all_logits(x_BcD, matrix, bias_W, layout)
        return loss(logits_BcW, tokens, fixed, learned)

    def one_piece(results, start, size):
        return chunk_blocks.write_at(results, piece_results(start, size), start)

    B, T, _ = x_BTD.shape
    a_piece = jax.eval_shape(lambda: piece_results(0, chunk_size))
    results = jax.tree.map(lambda z: jnp.zeros_like(z, shape=(B, T)), a_piece)
    return _over_pieces(one_piece, results, chunk_size, T)


def _forward(loss, layout, chunk_size, *operands):
    return run(loss, layout, chunk_size, *operands), operands


def _backward(loss, layout, chunk_size, saved, cotangents):
    x_BTD, matrix, bias_W, per_token, fixed, learned = saved
    g_BT, _ = cotangents

    def one_piece(sums, start, size):
        dx_BTD, dmatrix, dbias_W, dlearned = sums
        # The piece's logits again, and dlogits = g dloss/dlogits
        x_BcD, tokens, g_Bc = _cut((x_BTD, per_token, g_BT), start, size)
        given, mask_Bc = tokens
        x_BcD, given = (reference.unmasked(z, mask_Bc) for z in (x_BcD, given))
        tokens = given, mask_Bc
        logits_BcW = reference.all_logits(x_BcD, matrix, bias_W, layout)
        _, vjp = jax.vjp(lambda z, learned: loss(z, tokens, fixed, learned)[0], logits_BcW, learned)
        dlogits_BcW, more = vjp(g_Bc)
        dlearned = jax.tree.map(jnp.add, dlearned, more)
        # dx = dlogits matrix, dmatrix += dlogits^T x, dbias += sum dlogits
        letters = layout.lower()
        dx_BcD = matmul.einsum(f"btw,{letters}->btd", dlogits_BcW, matrix)
        dmatrix = dmatrix + matmul.einsum(f"btw,btd->{letters}", dlogits_BcW, x_BcD)
        if dbias_W is not None:
            dbias_W = dbias_W + jnp.sum(dlogits_BcW, axis=(0, 1))
        dx_BTD = chunk_blocks.write_at(dx_BTD, dx_BcD.astype(x_BTD.dtype), start)
        return dx_BTD, dmatrix, dbias_W, dlearned

    zeros = (
        chunk_blocks.buffers_like(x_BTD),
        jnp.zeros_like(matrix, g_BT.dtype),
        None if bias_W is None else jnp.zeros_like(bias_W, g_BT.dtype),
        jax.tree.map(jnp.zeros_like, learned),
    )
    dx_BTD, dmatrix, dbias_W, dlearned = _over_pieces(one_piece, zeros, chunk_size, g_BT.shape[1])
    if bias_W is not None and dbias_W is not None:
        dbias_W = dbias_W.astype(bias_W.dtype)
    dx_BTD = chunk_blocks.from_buffers(dx_BTD, x_BTD)
    return dx_BTD, dmatrix.astype(matrix.dtype), dbias_W, None, None, dlearned


run.defvjp(_forward, _backward)


def _over_pieces(one_piece, carry, chunk_size: int, T: int):
    """Folds one_piece(carry, start, size) over T tokens in chunks, the last of them shorter."""
    full, rest = divmod(T, chunk_size)
    if full:
        carry = lax.fori_loop(0, full, lambda i, c: one_piece(c, i * chunk_size, chunk_size), carry)
    return one_piece(carry, full * chunk_size, rest) if rest else carry


def _cut(arrays, start, size: int):
    return jax.tree.map(lambda z: lax.dynamic_slice_in_dim(z, start, size, axis=1), arrays)
