"""Tokens on grids: coordinates, rotations, patches and convolutions, against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import Layer
from seqmodels.modules import grids, positions
from tests.seqmodels.mixers import layer_suite

# Documents on the grid (4, 3): a whole one, one whose last row is incomplete, one of more rows than
# the grid has, and another run of the first one's id.
GRID, LENGTHS, IDS = (4, 3), (12, 5, 16, 4), (1, 2, 3, 1)
SEGMENT_IDS_BT = np.repeat(IDS, LENGTHS)[None].astype(np.int32)
T = sum(LENGTHS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_coordinates():
    """Each document starts at the origin; its first axis has no end."""
    found = np.asarray(grids.coordinates(1, T, SEGMENT_IDS_BT, GRID))[0]
    expected = [(i // 3, i % 3) for n in LENGTHS for i in range(n)]
    np.testing.assert_array_equal(found, expected)
    whole = grids.coordinates(2, 24, None, (2, 4, 3))
    expected = np.stack(np.unravel_index(np.arange(24), (2, 4, 3)), axis=-1)
    np.testing.assert_array_equal(whole, np.broadcast_to(expected, (2, 24, 3)))
    np.testing.assert_array_equal(grids.ravel(whole, (2, 4, 3))[0], np.arange(24))
    np.testing.assert_array_equal(
        grids.coordinates(1, T, SEGMENT_IDS_BT)[0, :14, 0], [*range(12), 0, 1]
    )
    given = jnp.ones((1, T, 2), jnp.int32)
    layer = Layer(0, 1, coordinates_BTA=given)
    assert grids.coordinates(1, T, SEGMENT_IDS_BT, GRID, layer) is given
    with pytest.raises(ValueError, match=r"coordinates have 2 axes, but grid \(2, 2, 2\) has 3"):
        grids.coordinates(1, T, SEGMENT_IDS_BT, (2, 2, 2), layer)


def test_errors_of_grids():
    with pytest.raises(ValueError, match=r"inline: grid \(4, 3\) has 12 tokens, but a row has 13"):
        grids.check_grid("inline", GRID, 13)
    grids.check_grid("inline", GRID, 13, SEGMENT_IDS_BT)
    for grid in ((), (4, 0), (2.0, 2)):
        with pytest.raises(ValueError, match="it must be the sizes of a document's axes"):
            grids.check_grid("inline", grid)


@pytest.mark.parametrize("angles", sorted(grids.ANGLES))
def test_rotations_on_one_axis_and_two(angles):
    """A piece turns with its own coordinate only; scores depend on differences of coordinates."""
    x_BTHK = jnp.asarray(normal(1, T, 2, 8), jnp.float32)
    coordinates_BTA = grids.coordinates(1, T, SEGMENT_IDS_BT, GRID)
    line_BT1 = grids.coordinates(1, T, SEGMENT_IDS_BT)
    one = grids.rope_nd(x_BTHK, line_BT1, 100.0, angles)
    if angles != "retnet":  # on one axis the others are the same
        expected = positions.rope(x_BTHK, line_BT1[..., 0], 100.0)
        np.testing.assert_allclose(one, expected, atol=1e-5)
    both = grids.rope_nd(x_BTHK, coordinates_BTA, 100.0, angles)
    only_height = grids.rope_nd(x_BTHK, coordinates_BTA * np.array([[[1, 0]]]), 100.0, angles)
    np.testing.assert_allclose(only_height[..., 4:], x_BTHK[..., 4:], atol=1e-6)
    np.testing.assert_allclose(only_height[..., :4], both[..., :4], atol=1e-6)
    moved = grids.rope_nd(x_BTHK, coordinates_BTA + np.array([[[3, 5]]]), 100.0, angles)
    scores, same = (jnp.einsum("bthk,bshk->bhts", x, x) for x in (both, moved))
    np.testing.assert_allclose(scores, same, atol=2e-4)


def test_frequencies_of_rotations():
    """The angles of one step on the second axis are those of each convention's formula."""
    K, base = 16, 50.0
    x_BTHK = jnp.zeros((1, 1, 1, K)).at[..., 8:12].set(1.0)
    pairs = np.arange(4)
    expected = {
        "rope": base ** (-2 * pairs / 8),
        "retnet": base ** -np.linspace(0, 1, 4),
        "lrpe": base ** (-2 * pairs / K),
    }
    for angles, frequency in expected.items():
        y = grids.rope_nd(x_BTHK, jnp.array([[[7, 1]]]), base, angles)[0, 0, 0]
        np.testing.assert_allclose(y[8:], [*np.cos(frequency), *np.sin(frequency)], atol=1e-6)
    assert grids.pieces(16, 3) == [8, 4, 4]
    with pytest.raises(ValueError, match="angles is 'mala'; choose one of lrpe, retnet, rope"):
        grids.rope_nd(x_BTHK, jnp.zeros((1, 1, 2)), angles="mala")
    with pytest.raises(ValueError, match="2 channels cannot be shared by 2 axes"):
        grids.rope_nd(x_BTHK[..., :2], jnp.zeros((1, 1, 2)))


@pytest.mark.parametrize("shape, patch, size", [
    ((2, 6, 4, 3), 2, (2, 2)),
    ((2, 6, 4, 1), (3, 1), (3, 1)),
    ((1, 4, 6, 4, 2), 2, (1, 2, 2)),
    ((1, 4, 6, 4, 2), (2, 3, 4), (2, 3, 4)),
    ((2, 6, 3), 2, (2,)),
])  # fmt: skip
def test_patches(shape, patch, size):
    """A token is its patch, row by row; putting patches together gives the images back."""
    images = normal(*shape)
    grid = tuple(n // p for n, p in zip(shape[1:-1], size))
    tokens_BTE = grids.patchify(images, patch)
    place = tuple(n - 1 for n in grid)
    last = images[0][tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, size))]
    np.testing.assert_array_equal(tokens_BTE[0, -1], last.reshape(-1))
    np.testing.assert_array_equal(grids.unpatchify(tokens_BTE, grid, patch), images)
    # The last axis is the fastest.
    corners = itertools.product(*(range(0, n, p) for n, p in zip(shape[1:-1], size)))
    np.testing.assert_array_equal(tokens_BTE[0, :, 0], [images[0][c][0] for c in corners])


def test_errors_of_patches():
    with pytest.raises(ValueError, match=r"patches of \(4, 4\) do not cut \(6, 8\) into whole"):
        grids.patchify(normal(1, 6, 8, 1), 4)
    with pytest.raises(ValueError, match=r"patch is \(2, 2, 2\); expected a number, or 2 positive"):
        grids.patchify(normal(1, 6, 8, 1), (2, 2, 2))
    with pytest.raises(ValueError, match=r"5 tokens of 4 channels are no grid \(2, 2\) of patches"):
        grids.unpatchify(normal(1, 5, 4), (2, 2), 2)


def truth(x_TD, w_TID, grid, kernel_size, lengths):
    """The convolution of each document as a loop over its tokens and taps."""
    y_TD, first = np.zeros_like(x_TD), 0
    offsets = list(itertools.product(*(range(-(n // 2), n // 2 + 1) for n in kernel_size)))
    for length in lengths:
        places = {}
        for i in range(length):
            rest, place = i, []
            for size in reversed(grid[1:]):
                rest, inner = divmod(rest, size)
                place.insert(0, inner)
            places[(rest, *place)] = first + i
        for place, t in places.items():
            for i, offset in enumerate(offsets):
                s = places.get(tuple(np.add(place, offset)))
                if s is not None:
                    y_TD[t] += w_TID[t, i] * x_TD[s]
        first += length
    return y_TD


CONVOLUTIONS = [
    ((4, 3), (3, 3), LENGTHS),
    ((4, 3), (5, 1), LENGTHS),
    ((4, 3), (3, 7), (12,)),
    ((2, 3, 2), (3, 3, 3), (12, 5, 16, 4)),
    ((2, 3, 2), (3, 1, 3), (12,)),
    (None, (3,), (7, 1, 4)),
    (None, (5,), (9,)),
]


@pytest.mark.parametrize("grid, kernel_size, lengths", CONVOLUTIONS)
@pytest.mark.parametrize("taps", ["shared", "per_row", "per_token"])
def test_depthwise_convolution(grid, kernel_size, lengths, taps):
    with jax.enable_x64(True):
        T, D, I = sum(lengths), 2, int(np.prod(kernel_size))
        x_BTD = normal(2, T, D, seed=1)
        shape = {"shared": (I, D), "per_row": (2, I, D), "per_token": (2, T, I, D)}[taps]
        w = normal(*shape, seed=2)
        w_BTID = np.broadcast_to(w[:, None] if taps == "per_row" else w, (2, T, I, D))
        expected = [
            truth(x_BTD[b], w_BTID[b], grid or (T,), kernel_size, lengths) for b in range(2)
        ]
        segment_ids_BT = None
        if len(lengths) > 1:
            segment_ids_BT = jnp.tile(np.repeat(IDS[: len(lengths)], lengths)[None], (2, 1))
        found = grids.depthwise(x_BTD, jnp.asarray(w), segment_ids_BT, grid, kernel_size)
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-12)
        if segment_ids_BT is None:  # a row of one document with ids
            ones = jnp.ones((2, T), jnp.int32)
            found = grids.depthwise(x_BTD, jnp.asarray(w), ones, grid, kernel_size)
            np.testing.assert_allclose(found, np.stack(expected), atol=1e-12)


def test_convolution_equals_the_compilers():
    x_BTD, w_ID = jnp.asarray(normal(2, 20, 3)), jnp.asarray(normal(9, 3))
    expected = jax.lax.conv_general_dilated(
        x_BTD.reshape(2, 4, 5, 3), w_ID.reshape(3, 3, 1, 3), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3,
    )  # fmt: skip
    found = grids.depthwise(x_BTD, w_ID, None, (4, 5))
    np.testing.assert_allclose(found, expected.reshape(2, 20, 3), atol=1e-5)


@pytest.mark.slow
def test_a_convolution_on_a_mesh():
    """Rows, channels and time split over devices give what one device gives, gradients too."""
    conv = grids.DepthwiseConv(3, GRID)
    x_BTD = jnp.asarray(normal(2, 2 * T + 6, 4), jnp.float32)
    segment_ids_BT = jnp.tile(np.pad(np.tile(SEGMENT_IDS_BT, 2), ((0, 0), (0, 6))), (2, 1))
    params = conv.init(jax.random.key(0), x_BTD, segment_ids_BT)
    layer_suite.check_on_a_mesh(conv.apply, params, x_BTD, segment_ids_BT)


def test_errors_of_convolutions():
    x_BTD = jnp.zeros((1, 12, 2))
    for kernel_size in (4, (3, 3, 3), (3, 2)):
        with pytest.raises(ValueError, match="kernel_size is .* expected an odd number, or 2 odd"):
            grids.DepthwiseConv(kernel_size, GRID).init(jax.random.key(0), x_BTD)
    with pytest.raises(ValueError, match=r"w has 8 taps, but a kernel of \(3, 3\) 9"):
        grids.depthwise(x_BTD, jnp.zeros((8, 2)), None, GRID)
    points = Layer(0, 1, coordinates_BTA=jnp.zeros((1, 12, 2), jnp.int32))
    with pytest.raises(ValueError, match="tokens whose coordinates are given"):
        grids.DepthwiseConv(3, GRID).init(jax.random.key(0), x_BTD, layer=points)


@pytest.mark.parametrize("kind", grids.KINDS)
def test_position_embeddings(kind):
    """The same place has the same vector in every document; other places have others."""
    module = grids.PositionEmbedding(kind, GRID)
    zeros_BTD = jnp.zeros((1, T, 8))
    e_BTD, variables = module.init_with_output(jax.random.key(0), zeros_BTD, SEGMENT_IDS_BT)
    np.testing.assert_array_equal(e_BTD[0, :5], e_BTD[0, 12:17])
    np.testing.assert_array_equal(e_BTD[0, :12], e_BTD[0, 17:29])
    assert len(np.unique(np.round(e_BTD[0, :12], 6), axis=0)) == 12
    whole = module.apply(variables, zeros_BTD[:, :12])
    np.testing.assert_array_equal(whole, e_BTD[:, :12])
    if kind == "sinusoidal":
        w = 1e4 ** (-np.arange(2) / 2)
        expected = [*np.sin(w), *np.cos(w), *np.sin(2 * w), *np.cos(2 * w)]
        np.testing.assert_allclose(e_BTD[0, 5], expected, atol=1e-6)
        return
    with pytest.raises(ValueError, match="has a vector for each place, so it needs a grid"):
        grids.PositionEmbedding(kind).init(jax.random.key(0), zeros_BTD, SEGMENT_IDS_BT)


def test_unknown_position_embedding():
    with pytest.raises(ValueError, match="kind is 'rope'; choose one of per_axis, per_token, sinu"):
        grids.PositionEmbedding("rope", GRID).init(jax.random.key(0), jnp.zeros((1, 12, 8)))
