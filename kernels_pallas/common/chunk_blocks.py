"""Blocks of chunks: how many chunks a chunked form treats at once, and the scan over the blocks.

Blocks follow each other in time. Each is cut from the inputs, and its results are put into the
outputs in place.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices

CPU_STATE_ROWS = 1024  # (chunk, head) pairs times width of a block that stays in a core's cache


def chunks_per_block(
    chunks: int, heads: int, widest: int, *, accelerator_pairs: int | None = None
) -> int:
    """Returns how many of a sequence's chunks make a block, so that blocks are as even as can be.

    On CPU a block stays in cache from one product to the next: 16 (chunk, head) pairs at a width
    of 64, where fewer gain nothing, 4 at 256, where more take longer. On an accelerator it is
    `accelerator_pairs`, None for the whole sequence: parallel work counts, a loop costs launches.

    Args:
      chunks: of the sequence.
      heads: of all rows together; a block holds all of them.
      widest: the larger of K and V.
      accelerator_pairs: (chunk, head) pairs of a block on an accelerator.
    """
    pairs = accelerator_pairs
    if devices.current().platform == "cpu":
        pairs = CPU_STATE_ROWS // widest
    if pairs is not None and not known(chunks, heads):
        return max(1, pairs // heads) if known(heads) else 1
    blocks = 1 if pairs is None else -(-chunks // max(1, pairs // heads))
    return -(-chunks // blocks)


def chunk_length(longest: int, T: int, least: int = 1) -> int:
    """Returns the least power of two, from `least` to `longest`, that holds T tokens."""
    return min(longest, max(least, 1 << (T - 1).bit_length())) if known(T) else longest


def known(*sizes) -> bool:
    """Returns whether sizes are integers, not symbolic ones of `jax.export`."""
    return all(isinstance(size, int) for size in sizes)


def padding(T: int, L: int) -> int:
    """Returns how many tokens to add to T for a multiple of L; a symbolic T is allowed."""
    return -(-T // L) * L - T


def scan(block, state, inputs, like, L: int, *, per_block=None, reverse: bool = False):
    """Runs a function over blocks of L tokens, one after the other.

    Args:
      block: (state, its entry of per_block, its inputs) -> (its outputs, next state, its result).
      state: what enters the first block (reverse: the last).
      inputs: a pytree of (B, T, ...), L dividing T; None stays None.
      like: a pytree of arrays (B, T, ...) with the shapes and dtypes of all outputs.
      per_block: a pytree of (N, ...) with an entry per block, or None.
      reverse: whether time runs backwards.

    Returns:
      The outputs (B, T, ...), the final state, and the blocks' results, stacked (N, ...).
    """

    def body(carry, at):
        state, buffers = carry
        n, entry = at
        outputs, state, result = block(state, entry, read(inputs, n, L))
        return (state, write_at(buffers, outputs, n * L)), result

    numbers_N = jnp.arange(jax.tree.leaves(like)[0].shape[1] // L)
    start = state, buffers_like(like)
    (state, buffers), results = jax.lax.scan(body, start, (numbers_N, per_block), reverse=reverse)
    return from_buffers(buffers, like), state, results


def read(tree, n, L: int):
    """Returns block n of arrays (B, T, ...), sliced where it is used: a transposed copy of the
    whole costs more than the rest.

    On CPU a block is read in memory's order before anything transposes it. Fused, the two read a
    head's rows here and there, and wait for memory at each (jaxlib 0.11.2: 80 us for 25 + 20).
    """

    on_cpu = devices.current().platform == "cpu"

    def one(x):
        x = jax.lax.dynamic_slice_in_dim(x, n * L, L, axis=1)
        return jax.lax.optimization_barrier(x) if on_cpu else x

    return jax.tree.map(one, tree)


def buffers_like(tree):
    """Returns buffers for arrays like these: `write_at` fills them, `from_buffers` reads them.

    On CPU a narrow float is held by its bits: at every write XLA's CPU backend (jaxlib 0.10 to
    0.12) converts a whole bfloat16 or float16 buffer to float32 and back, so that time would grow
    with the square of the length.
    """
    return jax.tree.map(lambda x: jnp.empty_like(x, _held_as(x.dtype)), tree)


def write_at(buffers, pieces, start):
    """Returns the buffers with the tokens from `start` on overwritten by this block."""

    def one(buffer, piece):
        if piece.dtype != buffer.dtype:
            piece = jax.lax.bitcast_convert_type(piece, buffer.dtype)
        return jax.lax.dynamic_update_slice_in_dim(buffer, piece, start, axis=1)

    return jax.tree.map(one, buffers, pieces)


def from_buffers(buffers, like):
    """Returns the arrays that the buffers hold, in the dtypes of `like`."""

    def one(buffer, x):
        held = buffer.dtype == x.dtype
        return buffer if held else jax.lax.bitcast_convert_type(buffer, x.dtype)

    return jax.tree.map(one, buffers, like)


def _held_as(dtype):
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2
    return jnp.uint16 if narrow and devices.current().platform == "cpu" else dtype


def to_chunks(x_BTHX: jax.Array, C: int, dtype=None) -> jax.Array:
    """Cuts (B, T, H, X) into chunks (N, B, H, C, X), T padded with zeros to a multiple of C."""
    missing = padding(x_BTHX.shape[1], C)
    if missing != 0:
        x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, missing), (0, 0), (0, 0)))
    B, _, H, X = x_BTHX.shape
    return x_BTHX.reshape(B, -1, C, H, X).transpose(1, 0, 3, 2, 4).astype(dtype or x_BTHX.dtype)


def from_chunks(x_NBHCX: jax.Array) -> jax.Array:
    """Joins chunks (N, B, H, C, X) to (B, N C, H, X)."""
    N, B, H, C, X = x_NBHCX.shape
    return x_NBHCX.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, X)
