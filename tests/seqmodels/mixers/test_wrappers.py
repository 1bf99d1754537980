"""bidirectional and ordered: identities, packed rows, and every mixer inside them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.modules import orders
from tests.seqmodels.mixers import layer_suite
from tests.seqmodels.mixers import mixer_suite as suite

GRID, D = (3, 4), 16
T = 12
FAST = ("hgrn",)  # of the mixers inside them
# One of each operator, and of those with a state of another kind; the others are exhaustive:
# python -m pytest -n auto -m exhaustive tests/seqmodels/mixers/test_wrappers.py
SLOW = (
    "attention",
    "delta_net",
    "gla",
    "hgrn2",
    "lightnet",
    "mamba",
    "mamba2",
    "shallow_ffn_causal",
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def made(name, **options):
    """(apply, params) of a mixer of width D; apply(params, x, ids, layer), compiled."""
    mixer = mixers.make(name, d_model=D, **options)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, T, D))))["params"]

    @jax.jit
    def apply(params, x_BTD, ids_BT=None, layer=None):
        return mixer.apply({"params": params}, x_BTD, ids_BT, layer=layer)[0]

    return apply, params


def test_bidirectional_is_the_mixer_and_the_mixer_on_reversed_tokens():
    apply, params = made("bidirectional", mixer="hgrn")
    inner, _ = made("hgrn")
    x_BTD = normal(2, T, D)
    expected = inner(params["forward"], x_BTD)
    expected += jnp.flip(inner(params["backward"], jnp.flip(x_BTD, 1)), 1)
    np.testing.assert_allclose(apply(params, x_BTD), expected, atol=1e-5)
    mean, _ = made("bidirectional", mixer="hgrn", combine="mean")
    np.testing.assert_allclose(mean(params, x_BTD), expected / 2, atol=1e-5)
    # With shared parameters reversed tokens have reversed outputs.
    shared, params = made("bidirectional", mixer="hgrn", shared=True)
    assert set(params) == {"forward"}
    turned = shared(params, jnp.flip(x_BTD, 1))
    np.testing.assert_allclose(jnp.flip(turned, 1), shared(params, x_BTD), atol=1e-5)


def test_ordered_is_the_mixer_on_permuted_tokens():
    x_BTD = normal(2, T, D)
    inner, _ = made("hgrn")
    for order in ("column_major", "reverse", "hilbert"):
        apply, params = made("ordered", mixer="hgrn", order=order, grid=GRID)
        order_N = orders.order(order, GRID)
        expected = inner(params["mixer"], x_BTD[:, order_N])[:, np.argsort(order_N)]
        np.testing.assert_allclose(apply(params, x_BTD), expected, atol=1e-5)
        # A row that is packed whole goes through the sort of documents.
        packed = apply(params, x_BTD, jnp.ones((2, T), jnp.int32))
        np.testing.assert_allclose(packed, expected, atol=1e-5)


def test_one_group_in_row_major_order_is_the_mixer():
    text = "bidirectional(mixer='hgrn')"
    apply, params = made("ordered", mixer=text, group=T)
    inner, _ = made("bidirectional", mixer="hgrn")
    x_BTD = normal(2, T, D)
    np.testing.assert_allclose(apply(params, x_BTD), inner(params["mixer"], x_BTD), atol=1e-6)


def test_groups_do_not_touch():
    """Groups of 5 tokens in scan order see themselves only; the last one has 2."""
    apply, params = made(
        "ordered", mixer="bidirectional(mixer='hgrn')", order="hilbert", group=5, grid=GRID
    )
    x_BTD = normal(1, T, D)
    jacobian = jax.jacobian(lambda x: apply(params, x)[0].sum(axis=-1))(x_BTD)
    sees_TT = np.abs(np.asarray(jacobian)[:, 0]).max(axis=-1) > 0
    group_T = np.argsort(orders.order("hilbert", GRID)) // 5
    np.testing.assert_array_equal(sees_TT, group_T[:, None] == group_T[None])


def test_documents_that_do_not_fill_the_grid():
    """They keep the order of the places that they have, and equal the same document alone."""
    lengths = (12, 5, 17)
    segment_ids_BT = jnp.asarray(np.repeat([1, 2, 3], lengths)[None])
    apply, params = made("ordered", mixer="hgrn", order="column_major", grid=GRID)
    inner, _ = made("hgrn")
    x_BTD = normal(1, sum(lengths), D)
    packed, first = apply(params, x_BTD, segment_ids_BT), 0
    order_N = orders.order("column_major", GRID)
    for length in lengths:
        document = x_BTD[:, first : first + length]
        scan = np.array([i for i in [*order_N, *(T + order_N)] if i < length])
        expected = inner(params["mixer"], document[:, scan])[:, np.argsort(scan)]
        np.testing.assert_allclose(packed[:, first : first + length], expected, atol=1e-5)
        alone = apply(params, document, jnp.ones((1, length), jnp.int32))
        np.testing.assert_allclose(alone, expected, atol=1e-5)
        first += length


def test_points_are_ordered_by_their_coordinates():
    """Tokens that are shuffled together with their coordinates have shuffled outputs."""
    apply, params = made("ordered", mixer="bidirectional(mixer='hgrn')", order="hilbert", grid=GRID)
    x_BTD, shuffle = normal(1, T, D), np.random.default_rng(3).permutation(T)
    coordinates_BTA = jnp.asarray(np.stack(np.unravel_index(np.arange(T), GRID), axis=-1)[None])
    layer = mixers.Layer(0, 1, coordinates_BTA=coordinates_BTA[:, shuffle])
    found = apply(params, x_BTD[:, shuffle], layer=layer)
    np.testing.assert_allclose(found, apply(params, x_BTD)[:, shuffle], atol=1e-5)
    without_grid = mixers.make("ordered", d_model=D, order="hilbert")
    with pytest.raises(ValueError, match="ordered: tokens with coordinates need a grid"):
        without_grid.init(jax.random.key(0), x_BTD, layer=layer)


class SeesCoordinates(nn.Module):
    """Stands for a mixer of whole documents: its outputs are the coordinates that it is given."""

    causal = False

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, *, layer):
        return jnp.zeros_like(x_BTD).at[..., :2].set(layer.coordinates_BTA), None


@pytest.mark.parametrize("ids", [None, np.repeat([1, 2], [7, 5])[None]], ids=["whole", "packed"])
def test_mixers_of_whole_documents_get_each_tokens_coordinates(monkeypatch, ids):
    wrapped = mixers.mixer_class("ordered")
    monkeypatch.setattr(wrapped, "make_wrapped", lambda *_, **keywords: SeesCoordinates(**keywords))
    mixer = wrapped(d_model=D, order="zigzag", grid=GRID)
    y_BTD, _ = mixer.apply({}, jnp.zeros((1, T, D)), ids)
    index_T = np.arange(T) if ids is None else np.array([*range(7), *range(5)])
    expected = np.stack(np.unravel_index(index_T, GRID), axis=-1)
    np.testing.assert_array_equal(y_BTD[0, :, :2], expected)


ERRORS = [
    ("bidirectional", {"mixer": "glaa"}, "unknown mixer 'glaa'; choose one of .*gla"),
    ("bidirectional", {"mixer": "gla(heads=2)"}, "'gla' has no option 'heads'; it has .*num_heads"),
    ("bidirectional", {"mixer": "gla + hgrn"}, "names 2 mixers; it takes one"),
    ("bidirectional", {"mixer": "gla("}, "pattern 'gla\\(' cannot be read"),
    ("bidirectional", {"mixer": "ordered"}, "sees whole documents already; take a causal one"),
    ("bidirectional", {"combine": "concat"}, "combine is 'concat'; choose one of mean, sum"),
    ("ordered", {"order": "snake"}, "unknown order 'snake'; choose one of row_major"),
    ("ordered", {"order": "temporal_row_major", "grid": GRID}, "is for grids of 3 axes"),
    ("ordered", {"grid": (5, 5)}, r"ordered: grid \(5, 5\) has 25 tokens, but a row has 12"),
    ("ordered", {"group": 0}, "ordered: group is 0; expected 1 or more tokens, or None"),
]


@pytest.mark.parametrize("name, options, message", ERRORS)
def test_errors(name, options, message):
    mixer = mixers.make(name, d_model=D, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, T, D)))


def inside(name):
    """The text of a mixer of the suite's small options, in a hilbert order and both directions."""
    options = suite.SMALL_OPTIONS.get(name, ({},))[0]
    options = options | ({"max_length": 32} if "max_length" in options else {})  # a row's tokens
    text = f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    return f"bidirectional(mixer={text!r})"


def marked(name):
    if name in FAST:
        return name
    return pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.exhaustive)


@pytest.mark.parametrize("name", [marked(name) for name in mixers.causal_names()])
def test_every_causal_mixer(name):
    """Packed documents equal each alone, other documents change no bit, and gradients are finite.

    In bfloat16, too.
    """
    width, lengths = suite.D, (T, 5, T)
    ids_BT = jnp.asarray(np.repeat([1, 2, 3], lengths)[None])
    make = functools.partial(
        mixers.make, "ordered", d_model=width, mixer=inside(name), order="hilbert", grid=GRID
    )
    mixer = make()
    bound_width = mixer.lower_bound_width()
    layer = mixers.Layer(1, 2, jnp.full((bound_width,), 0.3) if bound_width else None)
    assert bool(bound_width) == (name in ("hgrn", "hgrn2"))

    @jax.jit
    def run(params, x_BTD, other_BTD):
        def apply(x_BTD, ids_BT, mixer=mixer):
            return mixer.apply({"params": params}, x_BTD, ids_BT, layer=layer)[0]

        def loss(params, x_BTD):
            y_BTD, _ = mixer.apply({"params": params}, x_BTD, ids_BT, layer=layer)
            return jnp.sum(y_BTD[:, T : T + 5] ** 2)

        both = jnp.concatenate([x_BTD, other_BTD])
        packed, changed = jnp.split(apply(both, jnp.tile(ids_BT, (2, 1))), 2)
        alone = apply(x_BTD[:, :T], None)
        low = apply(x_BTD, ids_BT, make(dtype=jnp.bfloat16))
        return packed, alone, changed, low, jax.grad(loss, (0, 1))(params, x_BTD)

    init = jax.jit(functools.partial(mixer.init, layer=layer))
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, T, width))))["params"]
    x_BTD, other_BTD = (
        normal(1, sum(lengths), width, seed=1),
        normal(1, sum(lengths), width, seed=2),
    )
    other_BTD = other_BTD.at[:, T : T + 5].set(x_BTD[:, T : T + 5])
    packed, alone, changed, low, (params_bar, x_bar) = run(params, x_BTD, other_BTD)
    suite.assert_close(packed[:, :T], alone, suite.ERROR_FLOAT32, "packed, against alone")
    np.testing.assert_array_equal(packed[:, T : T + 5], changed[:, T : T + 5])
    assert low.dtype == jnp.bfloat16
    rms = np.sqrt(np.mean(np.square(np.asarray(low, np.float32) - packed)) / np.mean(packed**2))
    assert rms < suite.ERROR_BFLOAT16, f"bfloat16: {rms:.1e}"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params_bar, x_bar)))
    reached_T = np.abs(x_bar[0]).max(axis=-1) > 0
    np.testing.assert_array_equal(reached_T, np.asarray(ids_BT[0]) == 2)


@pytest.mark.slow
def test_on_a_mesh():
    """Rows, time and heads split over devices give what one device gives, gradients too."""
    mixer = mixers.make(
        "ordered", d_model=D, mixer="bidirectional(mixer='gla(num_heads=2)')", order="hilbert",
        grid=GRID, group=7,
    )  # fmt: skip
    ids_BT = jnp.tile(np.repeat([1, 2, 0], [T, 5, 7])[None], (2, 1))
    x_BTD = normal(2, ids_BT.shape[1], D)
    params = nn.unbox(mixer.init(jax.random.key(0), x_BTD, ids_BT))
    layer_suite.check_on_a_mesh(lambda *z: mixer.apply(*z)[0], params, x_BTD, ids_BT)
