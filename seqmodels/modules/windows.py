"""Tokens sorted into windows: boxes of a grid, or sets of points that share their keys."""

from collections.abc import Sequence

import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.modules import orders


def sort(keys: Sequence[Array], segment_ids_BT: Array | None) -> tuple[Array, Array, Array]:
    """Sorts each document's tokens by keys, (B, T) each, the first the most significant.

    Returns (index, inverse) as `orders.sort_documents` does, and ids (B, T) int32 of the sorted
    tokens, counted from 0 in each row: a new id begins with a document and where any key changes.
    """
    index_BT, inverse_BT = orders.sort_documents(keys, segment_ids_BT)
    # Documents keep their places in the row, and so do their ids.
    changed_BT = jnp.zeros(index_BT.shape, bool)
    if segment_ids_BT is not None:
        changed_BT = operators.starts(segment_ids_BT)
    for key_BT in keys:
        changed_BT |= operators.starts(jnp.take_along_axis(key_BT, index_BT, axis=1))
    ids_BT = operators.associative_scan(jnp.add, changed_BT.astype(jnp.int32), "BT")
    return index_BT, inverse_BT, ids_BT


def sizes(name: str, window: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Returns a box's size along each axis; one number is for all of them.

    name: the mixer's. Raises ValueError for sizes below 1, or another number of them.
    """
    found = (window,) * axes if isinstance(window, int) else tuple(window)
    if len(found) != axes or min(found) < 1:
        raise ValueError(
            f"{name}: window is {window!r} and tokens have {axes} axes: give one positive size, or "
            "one for each axis"
        )
    return found


def boxes(coordinates_BTA: Array, sizes: Sequence[int], shifted: Array | bool) -> list[Array]:
    """Returns the coordinates of each token's box along each axis, (B, T) int32 each.

    shifted: whether boxes are shifted by half their size, a boolean or a traced one.
    """
    found = []
    for axis, size in enumerate(sizes):
        offset = jnp.where(shifted, size // 2, 0)
        found.append((coordinates_BTA[..., axis] + offset) // size)
    return found
