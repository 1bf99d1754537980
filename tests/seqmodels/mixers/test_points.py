"""Mixers of points and videos against their definitions: LION, its voxels, and LinGen's MATE."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers, operators
from seqmodels.mixers import lion, mate
from seqmodels.modules import grids, orders, review_tokens, voxels, windows

B, D = 2, 8
VIDEO = (2, 4, 4)
T = 32


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def initialised(mixer, x, ids=None, layer=None):
    init = jax.jit(functools.partial(mixer.init, segment_ids_BT=ids, layer=layer))
    return nn.unbox(init(jax.random.key(0), x))


def apply(mixer, variables, x, ids=None, layer=None):
    return np.asarray(jax.jit(functools.partial(mixer.apply, layer=layer))(variables, x, ids)[0])


# ---------------------------------------------------------------- LION


def test_one_group_in_the_tokens_order_is_the_bidirectional_mixer():
    x, ids = normal(B, 12, D), jnp.asarray([[1] * 12, [1] * 5 + [2] * 7], jnp.int32)
    grouped = mixers.make("lion", d_model=D, mixer="hgrn", group=12, window=None)
    plain = mixers.make("bidirectional", d_model=D, mixer="hgrn")
    layer = mixers.Layer(0, 1, jnp.zeros((D,)))
    variables = initialised(plain, x, ids, layer)
    expected = apply(plain, variables, x, ids, layer)
    found = apply(grouped, {"params": {"mixer": variables["params"]}}, x, ids, layer)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sort_keys_are_windows_and_then_places():
    # One document with a point on each place of 6 x 4, rows of y, columns of x.
    coordinates = grids.coordinates(1, 24, None, (6, 4))

    def order(is_x, shifted):
        keys = lion.sort_keys(coordinates, 3, is_x, shifted)
        index, _ = orders.sort_documents(keys, None)
        return [tuple(map(int, coordinates[0, i])) for i in index[0]]

    y_x = [(y, x) for y in range(6) for x in range(4)]
    by_x = sorted(y_x, key=lambda p: (p[1] // 3, p[0] // 3, p[1], p[0]))
    by_y = sorted(y_x, key=lambda p: (p[0] // 3, p[1] // 3, p[0], p[1]))
    shifted = sorted(y_x, key=lambda p: ((p[1] + 1) // 3, (p[0] + 1) // 3, p[1], p[0]))
    assert order(True, False) == by_x
    assert order(False, False) == by_y
    assert order(True, True) == shifted


@pytest.mark.slow
def test_directions_and_shifts_alternate_by_layer():
    x, mixer = normal(1, 16, D), mixers.make("lion", d_model=D, mixer="hgrn", grid=(4, 4), window=2)
    layers = [mixers.Layer(i, 5, jnp.zeros((D,))) for i in range(5)]
    variables = initialised(mixer, x, layer=layers[0])
    y = [apply(mixer, variables, x, layer=layer) for layer in layers]
    assert all(np.any(y[i] != y[j]) for i in range(4) for j in range(i))
    np.testing.assert_array_equal(y[4], y[0])
    fixed = mixers.make(
        "lion", d_model=D, mixer="hgrn", grid=(4, 4), window=2, direction="y", shift=True
    )
    np.testing.assert_array_equal(apply(fixed, variables, x, layer=layers[0]), y[3])


def test_a_group_is_not_left():
    x = normal(1, 16, D)
    mixer = mixers.make("lion", d_model=D, mixer="hgrn", grid=(4, 4), window=None, group=4)
    layer = mixers.Layer(0, 1, jnp.zeros((D,)))  # x first: a group is a column
    variables = initialised(mixer, x, layer=layer)
    y = apply(mixer, variables, x, layer=layer)
    changed = apply(mixer, variables, x.at[:, 5].add(1.0), layer=layer)
    (seen,) = np.nonzero(np.any(y[0] != changed[0], axis=-1))
    assert set(seen) <= {1, 5, 9, 13} and {1, 9} <= set(seen)


def sets(points):
    """Returns {set: {coordinates: features}} of the first row."""
    found = {}
    for x, place, i in zip(*(np.asarray(z[0]) for z in points)):
        if i:
            assert tuple(place) not in found.setdefault(int(i), {}), "two points at one place"
            found[int(i)][tuple(map(int, place))] = x
    return found


def test_merging_adds_and_unmerging_copies():
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2]], jnp.int32)
    coordinates = jnp.asarray([[[0, 0], [1, 1], [2, 1], [5, 5], [0, 1], [0, 0], [3, 2]]], jnp.int32)
    x = normal(1, 7, D)
    merged, place = voxels.merge(voxels.points(x, coordinates, ids))
    x0 = np.asarray(x[0])
    expected = {
        1: {(0, 0): x0[0] + x0[1], (1, 0): x0[2], (2, 2): x0[3]},
        2: {(0, 0): x0[4] + x0[5], (1, 1): x0[6]},
    }
    found = sets(merged)
    assert {i: set(points) for i, points in found.items()} == {
        i: set(points) for i, points in expected.items()
    }
    for i, points in expected.items():
        for at, features in points.items():
            np.testing.assert_allclose(found[i][at], features, rtol=1e-6)
    assert np.all(np.diff(merged.ids_BN[0, :5]) >= 0) and not merged.ids_BN[0, 5:].any()
    back = np.asarray(voxels.unmerge(merged.x_BND, place))[0]
    np.testing.assert_allclose(back[1], x0[0] + x0[1], rtol=1e-6)
    np.testing.assert_allclose(back[6], x0[6], rtol=1e-6)


def test_the_largest_points_spawn_neighbours():
    ids = jnp.asarray([[1] * 5 + [2] * 10 + [3] * 4], jnp.int32)
    coordinates = grids.coordinates(1, 19, ids, (1, 100)) * 3 + 1
    x = jnp.abs(normal(1, 19, D)) * 0.1
    x = x.at[0, 2].add(1.0).at[0, 6].add(1.0).at[0, 14].add(1.0)
    old = voxels.points(x, coordinates, ids)
    new = voxels.spawn(old, 0.2)
    # A fifth of 19 is three points at most: one of five, two of ten and none of four.
    assert new.ids_BN.shape == (1, 19 + 4 * 3)
    np.testing.assert_array_equal(new.ids_BN[:, :19], old.ids_BN)
    np.testing.assert_array_equal(new.x_BND[:, :19], x)
    assert not new.x_BND[:, 19:].any()
    spawned = {}
    for i, place in zip(np.asarray(new.ids_BN[0, 19:]), np.asarray(new.coordinates_BNA[0, 19:])):
        spawned.setdefault(int(i), set()).add(tuple(map(int, place)))
    expected = {1: [2], 2: [6, 14]}
    assert spawned == {
        i: {
            (int(coordinates[0, t, 0]) + dy, int(coordinates[0, t, 1]) + dx)
            for t in tokens
            for dy in (-1, 1)
            for dx in (-1, 1)
        }
        for i, tokens in expected.items()
    }


@pytest.mark.slow
def test_the_u_reaches_beyond_a_group():
    x = normal(1, 16, D)
    options = {"mixer": "hgrn", "grid": (4, 4), "window": None, "group": 4}
    layer = mixers.Layer(0, 1, jnp.zeros((D,)))
    mixer = mixers.make("lion", d_model=D, depth=2, **options)
    variables = initialised(mixer, x, layer=layer)
    y = apply(mixer, variables, x, layer=layer)
    changed = apply(mixer, variables, x.at[:, 5].add(1.0), layer=layer)
    assert np.any(y[0] != changed[0], axis=-1).all()


# ---------------------------------------------------------------- MATE


def test_four_layers_scan_in_four_orders():
    mixer = mixers.make("mate", d_model=D, grid=VIDEO)
    coordinates = grids.coordinates(1, T, None, VIDEO)
    found = []
    for index, name in enumerate(mate.ROTARY):
        key = jax.jit(lambda i: mixer._scan_key(coordinates, mixers.Layer(i, 8)))(index)
        assert sorted(np.asarray(key[0])) == list(range(T))
        order = np.argsort(np.asarray(key[0]))
        np.testing.assert_array_equal(order, orders.order(name, VIDEO))
        found.append(tuple(order))
    assert len(set(found)) == 4


def test_windows_are_masked_full_attention():
    x, sizes, H = normal(B, T, D), (2, 2, 3), 2
    mixer = mixers.make("mate", d_model=D, grid=VIDEO, scan=None, window=sizes, num_heads=H)
    variables = initialised(mixer, x)
    p = {name: variables["params"][name]["kernel"] for name in "qkvo"}
    q, k, v = (np.asarray(x @ p[name]).reshape(B, T, H, -1) for name in "qkv")
    place = np.stack(np.unravel_index(np.arange(T), VIDEO), axis=-1)
    for index in (0, 1):
        box = (place + index * (np.array(sizes) // 2)) // sizes
        seen = (box[:, None] == box[None]).all(-1)
        logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
        weights = np.where(seen, np.exp(logits), 0.0)
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bhts,bshv->bthv", weights, v).reshape(B, T, D) @ p["o"]
        found = apply(mixer, variables, x, layer=mixers.Layer(index, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_mate_is_the_sum_of_its_branches():
    x, layer = normal(B, T, D), mixers.Layer(2, 4, jnp.zeros((D,)))
    options = {"d_model": D, "grid": VIDEO, "mixer": "hgrn", "review": 5}
    both = mixers.make("mate", **options)
    variables = initialised(both, x, layer=layer)
    parts = [
        mixers.make("mate", **(options | left_out))
        for left_out in ({"window": None}, {"scan": None})
    ]
    expected = sum(apply(part, variables, x, layer=layer) for part in parts)
    np.testing.assert_allclose(
        apply(both, variables, x, layer=layer), expected, rtol=1e-5, atol=1e-6
    )
    # Without review tokens the first branch is the bidirectional mixer in the layer's order.
    plain = mixers.make("mate", **(options | {"window": None, "review": None}))
    ordered = mixers.make(
        "ordered", d_model=D, grid=VIDEO, order=mate.ROTARY[2], mixer="bidirectional(mixer='hgrn')"
    )
    expected = apply(ordered, variables, x, layer=layer)
    np.testing.assert_allclose(
        apply(plain, variables, x, layer=layer), expected, rtol=1e-5, atol=1e-6
    )
    assert np.any(apply(parts[0], variables, x, layer=layer) != expected)


def test_review_tokens_are_means_in_front_of_their_document():
    x = normal(1, 11, D)
    ids = jnp.asarray([[1] * 7 + [2] * 2 + [3] * 2], jnp.int32)
    x_BSD, ids_BS, place = review_tokens.prepend(x, ids, 3)
    # Seven tokens have two review tokens, the second of which is the mean of four.
    np.testing.assert_array_equal(ids_BS[0], [1] * 9 + [2] * 2 + [3] * 2 + [0])
    np.testing.assert_allclose(x_BSD[0, 0], x[0, :3].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x_BSD[0, 1], x[0, 3:7].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x_BSD[0, 2:13], x[0])
    np.testing.assert_array_equal(place[0], np.arange(2, 13))
    assert not x_BSD[0, 13].any()


def test_windows_are_numbered_in_sorted_order():
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2]], jnp.int32)
    index, inverse, window = windows.sort([jnp.asarray([[3, 1, 3, 1, 1, 1]], jnp.int32)], ids)
    np.testing.assert_array_equal(index[0], [1, 3, 0, 2, 4, 5])
    np.testing.assert_array_equal(window[0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(jnp.take(index[0], inverse[0]), np.arange(6))
    assert operators.run_index(ids).shape == window.shape


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lion", {"direction": "z"}, "direction is 'z'; choose one of alternate, x, y"),
        ("lion", {"group": 0}, "group is 0; it must be at least 1"),
        ("lion", {"depth": -1}, "depth is -1; it must be at least 0"),
        ("lion", {"share": 1.0}, "share is 1.0"),
        ("mate", {"scan": None, "window": None}, "scan and window are both None"),
        ("mate", {"window": (2, 2)}, r"window is \(2, 2\) and tokens have 3 axes"),
        ("mate", {"review": 0, "window": None}, "review is 0; expected 1 or more"),
    ],
)
def test_errors_name_what_was_given(name, options, message):
    mixer = mixers.make(name, d_model=D, grid=VIDEO, **({"mixer": "hgrn"} | options))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        mixer.init(jax.random.key(0), jnp.zeros((1, T, D)))


def test_unknown_scans_list_the_choices():
    mixer = mixers.make("mate", d_model=D, grid=VIDEO, scan="spiral")
    with pytest.raises(ValueError, match="unknown order 'spiral'; choose one of row_major"):
        mixer.init(jax.random.key(0), jnp.zeros((1, T, D)))
