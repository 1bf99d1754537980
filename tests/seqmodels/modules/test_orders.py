"""Scan orders are permutations with the neighbours they promise; documents are sorted apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.modules import grids, orders

SEGMENT_IDS_BT = np.repeat([3, 0, 3, 5], [6, 4, 1, 9])[None].astype(np.int32)
T = SEGMENT_IDS_BT.shape[1]


def places(name, grid):
    """The coordinates (N, A) that an order visits, in turn."""
    return np.stack(np.unravel_index(orders.order(name, grid), grid), axis=-1)


@pytest.mark.parametrize("grid", [(7,), (4, 4), (3, 5), (1, 6), (2, 3, 4), (4, 4, 4)])
def test_orders_are_permutations(grid):
    for name, (axes, _) in orders.ORDERS.items():
        if axes in (None, len(grid)):
            assert sorted(orders.order(name, grid)) == list(range(np.prod(grid))), name


@pytest.mark.parametrize("name, grid", [
    ("zigzag", (3, 5)), ("zigzag", (2, 3, 4)), ("hilbert", (8, 8)), ("hilbert", (4, 4, 4)),
])  # fmt: skip
def test_successors_are_neighbours(name, grid):
    np.testing.assert_array_equal(np.abs(np.diff(places(name, grid), axis=0)).sum(axis=1), 1)


def test_a_hilbert_curve_fills_each_quarter_before_the_next():
    visited = places("hilbert", (8, 8)) // 4
    for quarter in visited.reshape(4, 16, 2):
        assert (quarter == quarter[:1]).all()
    # On other grids it is the same curve without the places that they lack.
    inside = [tuple(p) for p in places("hilbert", (8, 8)) if p[0] < 5 and p[1] < 7]
    assert [tuple(p) for p in places("hilbert", (5, 7))] == inside


def test_orders_by_hand():
    assert orders.order("column_major", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert orders.order("zigzag", (2, 3)).tolist() == [0, 1, 2, 5, 4, 3]
    assert orders.order("reverse", (2, 3)).tolist() == [5, 4, 3, 2, 1, 0]
    # (frames, height, width): which axis is the fastest, and which the slowest.
    fastest_and_slowest = {
        "spatial_row_major": (2, 0),
        "spatial_column_major": (1, 0),
        "temporal_row_major": (0, 1),
        "temporal_column_major": (0, 2),
    }
    for name, (fastest, slowest) in fastest_and_slowest.items():
        visited = places(name, (2, 3, 4))
        assert np.abs(visited[1] - visited[0]).tolist() == np.eye(3)[fastest].tolist(), name
        assert (np.diff(visited[:, slowest]) >= 0).all(), name
    four = {tuple(orders.order(name, (2, 3, 4))) for name in fastest_and_slowest}
    assert len(four) == 4


def test_errors_of_orders():
    with pytest.raises(ValueError, match="unknown order 'spiral'; choose one of row_major, .*hilb"):
        orders.order("spiral", (4, 4))
    with pytest.raises(
        ValueError,
        match=r"'temporal_row_major' is for grids of 3 axes.* is \(4, 4\); choose one of",
    ) as error:
        orders.order("temporal_row_major", (4, 4))
    assert "spatial" not in str(error.value)


def test_documents_are_sorted_apart():
    """A document keeps the order of the places that it has; a long one goes on behind the grid."""
    grid = (2, 3)
    coordinates_BTA = grids.coordinates(1, T, SEGMENT_IDS_BT, grid)
    for name in ("column_major", "reverse", "zigzag"):
        key_BT = orders.scan_keys(coordinates_BTA, name, grid)
        index_BT, inverse_BT = orders.sort_documents(key_BT, SEGMENT_IDS_BT)
        order_N = orders.order(name, grid)
        expected, first = [], 0
        for length in (6, 4, 1, 9):
            scan = [*order_N, *(6 + order_N)]
            expected += [first + i for i in scan if i < length]
            first += length
        np.testing.assert_array_equal(index_BT[0], expected)
        np.testing.assert_array_equal(index_BT[0][inverse_BT[0]], np.arange(T))
    # Without ids a row is one document; equal keys stay in order.
    index_BT, _ = orders.sort_documents(jnp.asarray([[2, 1, 2, 0, 1]], jnp.int32), None)
    assert index_BT[0].tolist() == [3, 1, 4, 0, 2]


def test_reversal_and_groups():
    index_T = np.asarray(orders.reversal(SEGMENT_IDS_BT))[0]
    assert index_T.tolist() == [*range(5, -1, -1), *range(9, 5, -1), 10, *range(19, 10, -1)]
    ids_T = np.asarray(orders.group_ids(1, T, SEGMENT_IDS_BT, 4))[0]
    assert np.unique(ids_T, return_counts=True)[1].tolist() == [4, 2, 4, 1, 4, 4, 1]
    assert (np.diff(ids_T) >= 0).all()
    whole_T = np.asarray(orders.group_ids(1, T, SEGMENT_IDS_BT, None))[0]
    assert np.bincount(whole_T).tolist() == [6, 4, 1, 9]
    assert np.diff(np.asarray(orders.group_ids(1, 5, None, 2))[0]).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("per_row", [False, True])
def test_permutations_and_their_gradients(per_row):
    """The backward pass is the inverse permutation, to second order too."""
    rng = np.random.default_rng(0)
    index = rng.permutation(5) if not per_row else np.stack([rng.permutation(5) for _ in "ab"])
    inverse = np.argsort(index, axis=-1)
    x_BTD, dy_BTD = rng.standard_normal((2, 2, 5, 3)).astype(np.float32)

    def truth(x_BTD):
        rows = np.arange(2)[:, None]
        return x_BTD[:, index] if not per_row else x_BTD[rows, index]

    y_BTD, vjp = jax.vjp(
        lambda x: orders.permute(x, jnp.asarray(index), jnp.asarray(inverse)), x_BTD
    )
    np.testing.assert_array_equal(y_BTD, truth(x_BTD))
    _, expected = jax.vjp(truth, jnp.asarray(x_BTD))
    np.testing.assert_array_equal(vjp(dy_BTD)[0], expected(dy_BTD)[0])

    def cubes(x_BTD):
        return jnp.sum(orders.permute(x_BTD, jnp.asarray(index), jnp.asarray(inverse)) ** 3)

    twice = jax.grad(lambda x: jnp.sum(jax.grad(cubes)(x)))(jnp.asarray(x_BTD))
    np.testing.assert_allclose(twice, 6 * x_BTD, rtol=1e-5)
