"""Spans: stretches of time that a chunked form treats at once, one after the other, cut from its arrays and put back in place."""

import jax


def take(tree, n, L: int):
    """Span n of arrays (B, T, ...). Cut where it is used: a transposed copy of the whole costs more than the rest."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, n * L, L, axis=1), tree)


def put(tree, spans, n, L: int):
    """The arrays with span n overwritten."""
    return jax.tree.map(
        lambda x, span: jax.lax.dynamic_update_slice_in_dim(x, span, n * L, axis=1), tree, spans
    )
