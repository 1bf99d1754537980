"""Spans: stretches of time that a chunked form treats at once, one after the other, cut from its arrays and put back in place."""

import jax

from kernels_pallas import targets


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
