"""Packed documents: what `segment_ids_BT` means to every operator.

A document is a run of equal ids. The state (or convolution tap) that enters a token is kept exactly when the
token before it, in the same row, has the same id. The first token of a row keeps `initial_state`.
"""

import jax
import jax.numpy as jnp


def starts(segment_ids_BT: jax.Array, reverse: bool = False) -> jax.Array:
    """True where a token begins a new document; column 0 is False, so an initial state enters.

    reverse: seen from the end, where a document begins at its last token; then the last column is False.
    """
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (0, 1) if reverse else (1, 0)))


def run_index(segment_ids_BT: jax.Array) -> jax.Array:
    """Number of document starts up to and including each token: equal for two tokens iff one document holds both."""
    return count_starts(starts(segment_ids_BT))


def count_starts(start_BT: jax.Array) -> jax.Array:
    """`run_index`, from what `starts` gave."""
    return jnp.cumsum(start_BT.astype(jnp.int32), axis=1)


def positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Index of each token within its document (the row's first document counts from 0)."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    start_index_BT = jnp.where(starts(segment_ids_BT), index_T[None], 0)
    return index_T[None] - jax.lax.cummax(start_index_BT, axis=1)
