"""Scan orders of tokens on a grid, and the permutation, reversal and grouping of packed documents.

An order is a permutation of a grid's places, counted row by row: its i-th number is the place that
is scanned i-th. Letters: N places of a grid, A its axes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.modules import grids

# ---------------------------------------------------------------- orders by name


def _by_axes(*axes: int) -> Callable:
    """Returns the order that goes along the last of these axes first."""

    def order(grid):
        return np.arange(math.prod(grid)).reshape(grid).transpose(axes or None).reshape(-1)

    return order


def _row_major(grid):
    """The last axis is the fastest: the order that tokens have."""
    return np.arange(math.prod(grid))


def _column_major(grid):
    """The first axis is the fastest."""
    return _by_axes(*reversed(range(len(grid))))(grid)


def _reverse(grid):
    """Row-major, backwards."""
    return np.arange(math.prod(grid))[::-1]


def _zigzag(grid):
    """Row-major with every other row backwards (boustrophedon), so that successors are neighbours.

    An axis runs backwards whenever the axes before it have made an odd number of steps.
    """
    step_N = np.arange(math.prod(grid))
    place_N = np.zeros_like(step_N)
    for axis, size in enumerate(grid):
        inner = math.prod(grid[axis + 1 :])
        outer_N, digit_N = step_N // (inner * size), step_N // inner % size
        place_N = place_N * size + np.where(outer_N % 2, size - 1 - digit_N, digit_N)
    return place_N


def _hilbert(grid):
    """The Hilbert curve of the smallest cube of side 2^b around the grid, restricted to the grid.

    Successors are neighbours where all sizes are one power of two; elsewhere the curve jumps over
    places that are not on the grid. The index of a place is that of J. Skilling, "Programming the
    Hilbert curve" (2004), for any number of axes.
    """
    axes, bits = len(grid), max(1, (max(grid) - 1).bit_length())
    x_AN = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid))
    # From the largest cubes to the smallest: undo each one's reflection or exchange of axes.
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for axis in range(axes):
            reflected_N = (x_AN[axis] >> bit) & 1 == 1
            swapped_N = np.where(reflected_N, 0, (x_AN[0] ^ x_AN[axis]) & low)
            x_AN[0] = np.where(reflected_N, x_AN[0] ^ low, x_AN[0] ^ swapped_N)
            x_AN[axis] ^= swapped_N
    # Gray code along the axes, and its carry from the last axis.
    for axis in range(1, axes):
        x_AN[axis] ^= x_AN[axis - 1]
    carry_N = np.zeros_like(x_AN[0])
    for bit in reversed(range(1, bits)):
        carry_N ^= np.where((x_AN[-1] >> bit) & 1, (1 << bit) - 1, 0)
    x_AN ^= carry_N[None]
    # The index on the curve has the axes' bits in turn, the highest first.
    index_N = np.zeros_like(x_AN[0])
    for bit in reversed(range(bits)):
        for axis in range(axes):
            index_N = index_N << 1 | (x_AN[axis] >> bit) & 1
    return np.argsort(index_N)


# {name: (number of axes that it takes, None for any, and grid -> the order)}. The last four are
# LinGen's (arXiv 2412.09856) on (frames, height, width): "spatial" scans frame by frame, "temporal"
# each place through all frames before the next place.
ORDERS: dict[str, tuple[int | None, Callable]] = {
    "row_major": (None, _row_major),
    "column_major": (None, _column_major),
    "reverse": (None, _reverse),
    "zigzag": (None, _zigzag),
    "hilbert": (None, _hilbert),
    "spatial_row_major": (3, _by_axes(0, 1, 2)),
    "spatial_column_major": (3, _by_axes(0, 2, 1)),
    "temporal_row_major": (3, _by_axes(1, 2, 0)),
    "temporal_column_major": (3, _by_axes(2, 1, 0)),
}


@functools.lru_cache(maxsize=256)
def order(name: str, grid: tuple[int, ...]) -> np.ndarray:
    """Returns the order called `name` of a grid's N places, (N,) ints: what is scanned i-th.

    Raises ValueError, listing the choices, for an unknown name or one for other numbers of axes.
    """
    if name not in ORDERS:
        raise ValueError(f"unknown order {name!r}; choose one of {', '.join(ORDERS)}")
    axes, function = ORDERS[name]
    if axes not in (None, len(grid)):
        choices = [other for other, (n, _) in ORDERS.items() if n in (None, len(grid))]
        raise ValueError(
            f"order {name!r} is for grids of {axes} axes, (frames, height, width), but the grid is "
            f"{grid}; choose one of {', '.join(choices)}"
        )
    grids.check_grid("order", grid)
    return function(grid)


# ---------------------------------------------------------------- packed documents


def scan_keys(coordinates_BTA: Array, name: str, grid: Sequence[int]) -> Array:
    """Returns each token's place in the order called `name`, (B, T) int32, to be sorted by.

    Tokens beyond the end of the grid's first axis come later: they lie on a copy of the grid behind
    it. Coordinates beyond the other axes count as the nearest on them.
    """
    N = math.prod(grid)
    rank_N = np.argsort(order(name, tuple(grid))).astype(np.int32)
    place_BT = grids.ravel(coordinates_BTA, grid)
    return place_BT // N * N + jnp.take(jnp.asarray(rank_N), place_BT % N)


def sort_documents(
    keys: Array | Sequence[Array], segment_ids_BT: Array | None
) -> tuple[Array, Array]:
    """Returns indices that sort the tokens of each document by keys, and the inverse indices.

    Documents stay where they are in the row, and equal keys in their order. Both results are (B, T)
    int32: token index_BT[b, t] comes t-th, and token t goes to place inverse_BT[b, t].

    keys: (B, T) numbers, or several arrays of them, of which later ones decide between equal ones.
    """
    keys = (keys,) if isinstance(keys, jax.Array | np.ndarray) else tuple(keys)
    B, T = keys[0].shape
    token_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((B, T), jnp.int32)
    document_BT = operators.run_index(segment_ids_BT)
    by = (document_BT, *keys)
    *_, index_BT = jax.lax.sort((*by, token_BT), dimension=1, num_keys=len(by))
    _, inverse_BT = jax.lax.sort((index_BT, token_BT), dimension=1, num_keys=1)
    return index_BT, inverse_BT


def reversal(segment_ids_BT: Array) -> Array:
    """Returns for each token the index of the one that takes its place when documents turn round.

    The result (B, T) int32 is its own inverse.
    """
    index_1T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    before_BT = operators.positions(segment_ids_BT)
    after_BT = jnp.flip(operators.positions(jnp.flip(segment_ids_BT, axis=1)), axis=1)
    return index_1T - before_BT + after_BT


@jax.custom_vjp
def permute(x: Array, index: Array, inverse: Array) -> Array:
    """Returns y_t = x_{index_t} along axis 1, for a permutation (T,) or (B, T) with its inverse.

    The backward pass gathers by `inverse`, where JAX's own would scatter.
    """
    del inverse
    if index.ndim == 1:
        return jnp.take(x, index, axis=1)
    index = index.reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _permute_forward(x, index, inverse):
    return permute(x, index, inverse), (index, inverse)


def _permute_backward(indices, dy):
    index, inverse = indices
    return permute(dy, inverse, index), None, None


permute.defvjp(_permute_forward, _permute_backward)


def group_ids(batch: int, length: int, segment_ids_BT: Array | None, group: int | None) -> Array:
    """Returns segment ids (B, T) int32 that cut each document into groups of `group` tokens.

    A document's last group is shorter if need be; None makes each document one group.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((batch, length), jnp.int32)
    start_BT = operators.starts(segment_ids_BT)
    if group is not None:
        start_BT |= operators.positions(segment_ids_BT) % group == 0
    return operators.associative_scan(jnp.add, start_BT.astype(jnp.int32), "BT")
