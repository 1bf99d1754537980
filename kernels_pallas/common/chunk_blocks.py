"""Spans: stretches of time that a chunked form treats at once, one after the other, cut from its
arrays and put back in place."""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices

CPU_STATE_ROWS = 1024  # of a width: how many (chunk, head) pairs make a span


def chunks_per_block(
    chunks: int, heads: int, widest: int, *, accelerator_pairs: int | None = None
) -> int:
    """How many of a sequence's chunks make a span, so that spans are as even as can be.

    heads: of all rows together, which a span always holds. widest: the larger of K and V. On CPU a
    span is to stay in cache from one product to the next: 16 (chunk, head) pairs at a width of 64,
    where fewer gain nothing, 4 at 256, where more take longer (two cores, forward and backward). On
    an accelerator it is `accelerator_pairs`, None for the whole sequence: there parallel work
    counts, and a loop costs launches.
    """
    pairs = accelerator_pairs
    if devices.current().platform == "cpu":
        pairs = CPU_STATE_ROWS // widest
    if pairs is not None and not known(chunks, heads):
        return max(1, pairs // heads) if known(heads) else 1
    spans = 1 if pairs is None else -(-chunks // max(1, pairs // heads))
    return -(-chunks // spans)


def chunk_length(longest: int, T: int, least: int = 1) -> int:
    """The power of two from `least` to `longest` that holds T tokens, or as many as it can."""
    return min(longest, max(least, 1 << (T - 1).bit_length())) if known(T) else longest


def known(*sizes) -> bool:
    """Whether the sizes are numbers: exported with symbolic shapes, a program is to serve all."""
    return all(isinstance(size, int) for size in sizes)


def padding(T: int, L: int) -> int:
    """How many tokens to add so that pieces of L divide T; so written that a symbolic sum is seen
    to be a multiple.
    """
    return -(-T // L) * L - T


def read(tree, n, L: int):
    """Span n of arrays (B, T, ...). Cut where it is used: a transposed copy of the whole costs more
    than the rest.

    On CPU each span is read in memory's order, before anything transposes it: fused, the two read a
    head's row here and there from memory, and wait for each (16 heads of 64 x 64: 80 us, apart 25
    and 20; jaxlib 0.11.2).
    """

    on_cpu = devices.current().platform == "cpu"

    def one(x):
        span = jax.lax.dynamic_slice_in_dim(x, n * L, L, axis=1)
        return jax.lax.optimization_barrier(span) if on_cpu else span

    return jax.tree.map(one, tree)


def buffers_like(tree):
    """Buffers for arrays like these: `put` writes a span of them, `written` gives the arrays back.

    On CPU a narrow float is held by its bits: at every write of a span XLA's CPU backend (jaxlib
    0.10 to 0.12) converts a whole bfloat16 or float16 buffer to float32 and back, so that time
    would grow with the square of the length.
    """
    return jax.tree.map(lambda x: jnp.empty_like(x, _held_as(x.dtype)), tree)


def write(buffers, spans, n, L: int):
    """The buffers with span n overwritten."""
    return write_at(buffers, spans, n * L)


def write_at(buffers, pieces, start):
    """The buffers with a piece of time overwritten that begins at `start`."""

    def one(buffer, piece):
        if piece.dtype != buffer.dtype:
            piece = jax.lax.bitcast_convert_type(piece, buffer.dtype)
        return jax.lax.dynamic_update_slice_in_dim(buffer, piece, start, axis=1)

    return jax.tree.map(one, buffers, pieces)


def from_buffers(buffers, like):
    """The arrays that the buffers hold, in the dtypes of `like`."""

    def one(buffer, x):
        held = buffer.dtype == x.dtype
        return buffer if held else jax.lax.bitcast_convert_type(buffer, x.dtype)

    return jax.tree.map(one, buffers, like)


def _held_as(dtype):
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2
    return jnp.uint16 if narrow and devices.current().platform == "cpu" else dtype


def to_chunks(x_BTHX: jax.Array, C: int, dtype=None) -> jax.Array:
    """(B, T, H, X) to (N, B, H, C, X), zeros behind the last token where C does not divide T."""
    x_BTHX = jnp.pad(x_BTHX, ((0, 0), (0, padding(x_BTHX.shape[1], C)), (0, 0), (0, 0)))
    B, _, H, X = x_BTHX.shape
    return x_BTHX.reshape(B, -1, C, H, X).transpose(1, 0, 3, 2, 4).astype(dtype or x_BTHX.dtype)


def from_chunks(x_NBHCX: jax.Array) -> jax.Array:
    """(N, B, H, C, X) to (B, N C, H, X)."""
    N, B, H, C, X = x_NBHCX.shape
    return x_NBHCX.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, X)
