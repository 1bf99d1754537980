"""Reductions over the tokens of each document of a packed row, beside `operators.document_totals`.

Without segment ids each row is one document.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array


def running(combine: Callable, x_BTHK: Array, segment_ids_BT: Array | None) -> Array:
    """Returns combine of all x of a token's document up to the token itself, (B, T, H, K).

    combine: an associative function of two arrays, element by element, such as jnp.maximum.
    """
    if segment_ids_BT is None:
        return operators.associative_scan(combine, x_BTHK, "BTHK")

    def compose(first, then):
        (x, starts), (next_x, next_starts) = first, then
        return jnp.where(next_starts, next_x, combine(x, next_x)), starts | next_starts

    start_BTHK = jnp.broadcast_to(operators.starts(segment_ids_BT)[..., None, None], x_BTHK.shape)
    return operators.associative_scan(compose, (x_BTHK, start_BTHK), "BTHK")[0]


def maximum(x_BTHK: Array, segment_ids_BT: Array | None) -> Array:
    """Returns the maximum over each token's document, at each of its tokens, (B, T, H, K)."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.max(x_BTHK, axis=1, keepdims=True), x_BTHK.shape)
    # Of the tokens up to each, and of those from it on.
    before = running(jnp.maximum, x_BTHK, segment_ids_BT)
    after = running(jnp.maximum, jnp.flip(x_BTHK, 1), jnp.flip(segment_ids_BT, 1))
    return jnp.maximum(before, jnp.flip(after, 1))


def softmax(x_BTHK: Array, segment_ids_BT: Array | None) -> Array:
    """Returns the softmax over the tokens of each document, per head and channel, in float32.

    The document's own maximum is subtracted first, so that documents of a row may differ in size by
    any factor.
    """
    x_BTHK = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
    largest_BTHK = maximum(jax.lax.stop_gradient(x_BTHK), segment_ids_BT)
    weight_BTHK = jnp.exp(x_BTHK - largest_BTHK)
    return weight_BTHK / operators.document_totals(weight_BTHK, segment_ids_BT)
