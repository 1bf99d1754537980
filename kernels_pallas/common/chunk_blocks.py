"""Blocks of chunks: how many chunks a chunked operator computes at once, and a scan over blocks.

A chunk is C consecutive tokens, a block several consecutive chunks. The scan slices each block from
the inputs, and writes its results into the outputs in place.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices

CPU_STATE_ROWS = 1024  # (chunk, head) pairs times width of a block that stays in a core's cache


def chunks_per_block(
    chunks: int, heads: int, widest: int, *, accelerator_pairs: int | None = None
) -> int:
    """Returns how many chunks make a block, such that a sequence's blocks are nearly equal.

    On CPU a block stays in cache from one product to the next: 16 (chunk, head) pairs at a width of
    64, where fewer gain nothing, 4 at 256, where more take longer. On an accelerator a block is
    larger, up to the whole sequence: there parallel work counts, and each step of a loop costs
    kernel launches.

    Args:
      chunks: the number of the sequence's chunks.
      heads: the number of heads times the batch size; a block holds all of them.
      widest: the larger of K and V.
      accelerator_pairs: (chunk, head) pairs of a block on an accelerator; None is all of them.
    """
    pairs = accelerator_pairs
    if devices.current().platform == "cpu":
        pairs = CPU_STATE_ROWS // widest
    if pairs is not None and not known(chunks, heads):
        return max(1, pairs // heads) if known(heads) else 1
    blocks = 1 if pairs is None else -(-chunks // max(1, pairs // heads))
    return -(-chunks // blocks)


def chunk_length(longest: int, T: int, least: int = 1) -> int:
    """Returns the chunk length for T tokens: a power of two, at most `longest`, that holds them."""
    return min(longest, max(least, 1 << (T - 1).bit_length())) if known(T) else longest


def known(*sizes) -> bool:
    """Returns whether all sizes are integers, rather than symbolic dimensions of `jax.export`."""
    return all(isinstance(size, int) for size in sizes)


def padding(T: int, L: int) -> int:
    """Returns how many tokens T lacks to a multiple of L; T may be a symbolic dimension."""
    return -(-T // L) * L - T


def scan(block, state, inputs, like, L: int, *, per_block=None, reverse: bool = False):
    """Scans a function over the blocks of L tokens of arrays (B, T, ...), carrying a state.

    Args:
      block: maps (state, the block's entry of per_block, its inputs) to (its outputs, the next
        state, its result).
      state: what enters the first block (reverse: the last).
      inputs: a pytree of (B, T, ...), L dividing T; None stays None.
      like: a pytree of arrays (B, T, ...) with the shapes and dtypes of all outputs.
      per_block: a pytree of (N, ...) with an entry for each of the N blocks, or None.
      reverse: whether the scan runs from the last block to the first.

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
    """Returns the n-th block of L tokens of each array (B, T, ...) in a pytree.

    It is sliced where it is used: a transposed copy of the whole arrays costs more than the rest.
    On CPU a block is read in memory's order before anything transposes it. Fused, the two read a
    head's rows here and there, and wait for memory at each (jaxlib 0.11.2: 80 us, apart 25 + 20).
    """

    on_cpu = devices.current().platform == "cpu"

    def one(x):
        x = jax.lax.dynamic_slice_in_dim(x, n * L, L, axis=1)
        return jax.lax.optimization_barrier(x) if on_cpu else x

    return jax.tree.map(one, tree)


def buffers_like(tree):
    """Returns uninitialised output buffers with the shapes of a pytree of arrays.

    `write_at` fills them and `from_buffers` reads them. On CPU 16-bit floats are held as uint16: at
    every write XLA's CPU backend (jaxlib 0.10 to 0.12) converts a whole bfloat16 or float16 buffer
    to float32 and back, so that time would grow with the square of the length.
    """
    return jax.tree.map(lambda x: jnp.empty_like(x, _held_as(x.dtype)), tree)


def write_at(buffers, pieces, start):
    """Returns the buffers (B, T, ...) with `pieces` (B, L, ...) written from token `start` on."""

    def one(buffer, piece):
        if piece.dtype != buffer.dtype:
            piece = jax.lax.bitcast_convert_type(piece, buffer.dtype)
        return jax.lax.dynamic_update_slice_in_dim(buffer, piece, start, axis=1)

    return jax.tree.map(one, buffers, pieces)


def from_buffers(buffers, like):
    """Returns the arrays that `buffers`, made by `buffers_like`, hold, in the dtypes of `like`."""

    def one(buffer, x):
        held = buffer.dtype == x.dtype
        return buffer if held else jax.lax.bitcast_convert_type(buffer, x.dtype)

    return jax.tree.map(one, buffers, like)


def _held_as(dtype):
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2
    return jnp.uint16 if narrow and devices.current().platform == "cpu" else dtype


def to_chunks(x_BTHX: jax.Array, C: int, dtype=None) -> jax.Array:
    """Reshapes (B, T, H, X) to N chunks of C tokens, (N, B, H, C, X), zero-padding T as needed."""
    missing = padding(x_BTHX.shape[1], C)
    if missing != 0:
        x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, missing), (0, 0), (0, 0)))
    B, _, H, X = x_BTHX.shape
    return x_BTHX.reshape(B, -1, C, H, X).transpose(1, 0, 3, 2, 4).astype(dtype or x_BTHX.dtype)


def from_chunks(x_NBHCX: jax.Array) -> jax.Array:
    """Reshapes N chunks of C tokens, (N, B, H, C, X), to (B, N C, H, X)."""
    N, B, H, C, X = x_NBHCX.shape
    return x_NBHCX.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, X)
