"""Spans: stretches of time that a chunked form treats at once, one after the other, cut from its arrays and put back in place."""

import jax

from kernels_pallas import targets

CPU_STATE_ROWS = 1024  # of a width: how many (chunk, head) pairs make a span


def chunks_in_one(
    chunks: int, heads: int, widest: int, *, accelerator_pairs: int | None = None
) -> int:
    """How many of a sequence's chunks make a span, so that spans are as even as can be.

    heads: of all rows together, which a span always holds. widest: the larger of K and V. On CPU a span is to stay in
    cache from one product to the next: 16 (chunk, head) pairs at a width of 64, where fewer gain nothing, 4 at 256,
    where more take longer (two cores, forward and backward). On an accelerator it is `accelerator_pairs`, None for the
    whole sequence: there parallel work counts, and a loop costs launches.
    """
    pairs = accelerator_pairs
    if targets.current().platform == "cpu":
        pairs = CPU_STATE_ROWS // widest
    spans = 1 if pairs is None else -(-chunks // max(1, pairs // heads))
    return -(-chunks // spans)


def take(tree, n, L: int):
    """Span n of arrays (B, T, ...). Cut where it is used: a transposed copy of the whole costs more than the rest.

    On CPU each span is read in memory's order, before anything transposes it: fused, the two read a head's row here and
    there from memory, and wait for each (16 heads of 64 x 64: 80 us, apart 25 and 20; jaxlib 0.11.2).
    """

    on_cpu = targets.current().platform == "cpu"

    def one(x):
        span = jax.lax.dynamic_slice_in_dim(x, n * L, L, axis=1)
        return jax.lax.optimization_barrier(span) if on_cpu else span

    return jax.tree.map(one, tree)


def put(tree, spans, n, L: int):
    """The arrays with span n overwritten."""
    return jax.tree.map(
        lambda x, span: jax.lax.dynamic_update_slice_in_dim(x, span, n * L, axis=1), tree, spans
    )
