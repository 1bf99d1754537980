"""Point sets of static size: voxels that are merged into larger ones, and new ones between them.

Letters: A axes of the space, N places of a point set.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.modules import orders, windows


class Points(NamedTuple):
    """Fields of packed point sets: N places per row.

    Attributes:
      x_BND: features, 0 at empty places.
      coordinates_BNA: whole coordinates, int32.
      ids_BN: the set that a point belongs to, numbered from 1 in its row; 0 is an empty place. A
        set's points need not follow each other.
    """

    x_BND: Array
    coordinates_BNA: Array
    ids_BN: Array


def points(x_BTD: Array, coordinates_BTA: Array, segment_ids_BT: Array | None) -> Points:
    """Returns the Points of a packed row, in which each document is a set, padding too."""
    ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    if segment_ids_BT is not None:
        ids_BT = operators.run_index(segment_ids_BT) + 1
    return Points(x_BTD, coordinates_BTA, ids_BT)


def merge(old: Points) -> tuple[Points, Array]:
    """Merges points whose coordinates // 2 are equal: their features are added.

    Returns the merged points, on as many places as before, and each old point's new place,
    (B, N) int32. The new points of a set follow each other, sorted by their coordinates; empty
    places come last.
    """
    B, N, D = old.x_BND.shape
    coarse_BNA = old.coordinates_BNA // 2
    empty_BN = old.ids_BN == 0
    # Empty places come last, and are one point, which is left out.
    keys = [empty_BN.astype(jnp.int32), old.ids_BN]
    keys += [jnp.where(empty_BN, 0, coarse_BNA[..., axis]) for axis in range(coarse_BNA.shape[-1])]
    _, inverse_BN, new_BN = windows.sort(keys, None)
    place_BN = jnp.take_along_axis(new_BN, inverse_BN, axis=1)
    row_B1 = jnp.arange(B)[:, None]
    taken_BN = jnp.where(empty_BN, N, place_BN)
    x_BND = jnp.zeros_like(old.x_BND).at[row_B1, taken_BN].add(old.x_BND, mode="drop")
    ids_BN = jnp.zeros_like(old.ids_BN).at[row_B1, taken_BN].set(old.ids_BN, mode="drop")
    coordinates_BNA = jnp.zeros_like(coarse_BNA).at[row_B1, taken_BN].set(coarse_BNA, mode="drop")
    return Points(x_BND, coordinates_BNA, ids_BN), place_BN


def unmerge(x_BND: Array, place_BN: Array) -> Array:
    """Returns for each old point the features of the point that it was merged into."""
    return jnp.take_along_axis(x_BND, place_BN[..., None], axis=1)


def spawn(old: Points, share: float) -> Points:
    """Adds empty neighbours of the points with the largest mean features (LION, arXiv 2407.18232).

    The share of each set's points, rounded down, whose mean feature is largest each spawn four
    points with zero features, at the distances (-1, -1), (-1, 1), (1, -1) and (1, 1) along the last
    two axes (-1 and 1 on a single axis), not below coordinate 0. The old points keep their places;
    the new ones come after them, at as many places as the share of N allows.
    """
    B, N, D = old.x_BND.shape
    A, K = old.coordinates_BNA.shape[-1], int(share * N)
    if K == 0:
        return old
    # Each point's rank in its set, the largest mean feature first.
    score_BN = jnp.mean(jax.lax.stop_gradient(old.x_BND).astype(jnp.float32), axis=-1)
    index_BN, inverse_BN = orders.sort_documents((old.ids_BN, -score_BN), None)
    sorted_ids_BN = jnp.take_along_axis(old.ids_BN, index_BN, axis=1)
    rank_BN = operators.positions(sorted_ids_BN)
    after_BN = jnp.flip(operators.positions(jnp.flip(sorted_ids_BN, axis=1)), axis=1)
    wanted_BN = jnp.floor(share * (rank_BN + after_BN + 1) + 1e-4).astype(jnp.int32)
    chosen_BN = jnp.take_along_axis(rank_BN < wanted_BN, inverse_BN, axis=1) & (old.ids_BN > 0)
    # The chosen points, at most K of them, and their neighbours.
    first_BK = jnp.argsort(~chosen_BN, axis=1, stable=True)[:, :K]
    ids_BK = jnp.take_along_axis(jnp.where(chosen_BN, old.ids_BN, 0), first_BK, axis=1)
    coordinates_BKA = jnp.take_along_axis(old.coordinates_BNA, first_BK[..., None], axis=1)
    coordinates, ids = [old.coordinates_BNA], [old.ids_BN]
    for steps in itertools.product((-1, 1), repeat=min(A, 2)):
        offset_A = jnp.array((0,) * (A - len(steps)) + steps, jnp.int32)
        coordinates.append(jnp.maximum(coordinates_BKA + offset_A[None, None], 0))
        ids.append(ids_BK)
    ids_BM = jnp.concatenate(ids, axis=1)
    x_BMD = jnp.pad(old.x_BND, ((0, 0), (0, ids_BM.shape[1] - N), (0, 0)))
    return Points(x_BMD, jnp.concatenate(coordinates, axis=1), ids_BM)
