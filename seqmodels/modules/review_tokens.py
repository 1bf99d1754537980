"""Review tokens: pooled copies of a document's tokens, put in front of it (LinGen)."""

from typing import NamedTuple

import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array


class Reviewed(NamedTuple):
    """Fields of packed rows with review tokens, on S places.

    Attributes:
      x_BSD: each document's review tokens and then its tokens; 0 at the empty places at the end.
      segment_ids_BS: ids of documents, numbered from 1 in a row; 0 at empty places.
      place_BT: the place of each token.
    """

    x_BSD: Array
    segment_ids_BS: Array
    place_BT: Array


def prepend(x_BTD: Array, segment_ids_BT: Array | None, size: int) -> Reviewed:
    """Puts means of `size` tokens each, which follow each other, in front of their document.

    A document of n tokens has floor(n / size) such means; the last is over what is left, too.
    There are S = T + floor(T / size) places, which always suffice.
    """
    (B, T, D), R = x_BTD.shape, x_BTD.shape[1] // size
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((B, T), jnp.int32)
    document_BT = operators.run_index(segment_ids_BT)
    position_BT = operators.positions(segment_ids_BT)
    left_BT = jnp.flip(operators.positions(jnp.flip(segment_ids_BT, axis=1)), axis=1)
    # How many review tokens t's document has, and how many it and all earlier ones have.
    count_BT = (position_BT + left_BT + 1) // size
    up_to_BT = jnp.cumsum(jnp.where(position_BT == 0, count_BT, 0), axis=1)
    place_BT = jnp.arange(T, dtype=jnp.int32)[None] + up_to_BT
    # The review token that t is pooled into, and that one's place; none is number R.
    number_BT = jnp.minimum(position_BT // size, count_BT - 1)
    none_BT = count_BT == 0
    review_BT = jnp.where(none_BT, R, up_to_BT - count_BT + number_BT)
    review_place_BT = jnp.where(none_BT, T + R, place_BT - position_BT - count_BT + number_BT)
    # Means over the tokens of each review token.
    row_B1 = jnp.arange(B)[:, None]
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    sums_BRD = jnp.zeros((B, R, D), wide).at[row_B1, review_BT].add(x_BTD.astype(wide), mode="drop")
    size_BR = jnp.zeros((B, R), wide).at[row_B1, review_BT].add(1.0, mode="drop")
    means_BRD = (sums_BRD / jnp.maximum(size_BR, 1.0)[..., None]).astype(x_BTD.dtype)
    # What lies at each place: a token's index, T + a review token's, or nothing.
    source_BS = jnp.full((B, T + R), T + R, jnp.int32)
    token_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    source_BS = source_BS.at[row_B1, place_BT].set(token_BT, mode="drop")
    source_BS = source_BS.at[row_B1, review_place_BT].set(T + review_BT, mode="drop")
    ids_BS = jnp.zeros((B, T + R), jnp.int32)
    for places_BT in (place_BT, review_place_BT):
        ids_BS = ids_BS.at[row_B1, places_BT].set(document_BT + 1, mode="drop")
    nothing_B1D = jnp.zeros_like(x_BTD[:, :1])
    x_BSD = jnp.concatenate([x_BTD, means_BRD, nothing_B1D], axis=1)
    return Reviewed(jnp.take_along_axis(x_BSD, source_BS[..., None], axis=1), ids_BS, place_BT)
