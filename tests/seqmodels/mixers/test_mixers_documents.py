"""Systems of linear attention over whole documents against explicit weights in NumPy float64.

Each equation is written out as a matrix of weights per head. What all mixers share is in
`mixer_suite.py` and `document_suite.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from seqmodels import mixers, operators
from seqmodels.modules import feature_maps
from tests.seqmodels.mixers.test_mixers_linear import dense, layer_norm, rms, silu

D, H, K = 32, 4, 8
GRID = (2, 3)
N = 6
SYSTEMS = "inline", "lit", "linfusion", "mala", "nalaformer", "rala", "sana_video", "slab"


def make(name, length=N, **options):
    """Returns the mixer, its first parameters, and the same plus noise in float64."""
    mixer = mixers.make(name, d_model=D, **options)
    first = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, length, D))))["params"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda p: np.float64(p) + 0.1 * rng.standard_normal(p.shape), first)
    return mixer, first, noisy


def apply(mixer, params, x, segment_ids=None, state=None, layer=None):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    run = jax.jit(functools.partial(mixer.apply, layer=layer))
    y, state = run({"params": params}, jnp.asarray(x, jnp.float32), segment_ids, state)
    return np.asarray(y), state


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


# ------------------------------------------------------------------ equations


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def relu(x):
    return np.maximum(x, 0)


def norm_power(q):
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    power = 3 * (0.5 + np.tanh(norm))
    return np.concatenate([relu(q / norm) ** power, relu(-q / norm) ** power], axis=-1)


def signed_cube(k):
    return np.concatenate([relu(k) ** 3, relu(-k) ** 3], axis=-1)


def turned(x, grid, last_angle):
    """Turns the first half of each K channels by a token's row, the second by its column.

    Angles of an axis go from 1 to `last_angle`, as a geometric sequence.
    """
    row, column = np.divmod(np.arange(x.shape[0]), grid[1])
    pieces = x.reshape(x.shape[0], H, -1, 2, 2, K // 4)  # ... axis, half of a pair, pair
    z = pieces[..., 0, :] + 1j * pieces[..., 1, :]
    frequency = last_angle ** np.linspace(0, 1, K // 4)
    place = np.stack([row, column], axis=-1)[:, None, None, :, None]
    z = z * np.exp(1j * place * frequency)
    return np.stack([z.real, z.imag], axis=-2).reshape(x.shape)


def convolved(v, taps, bias, grid):
    """Convolves v (n, D) on its grid with taps (I, D), zeros beyond the edges."""
    size = int(np.sqrt(len(taps)))
    image = np.pad(v.reshape(*grid, -1), [(size // 2,) * 2] * 2 + [(0, 0)])
    y = sum(
        taps[size * i + j] * image[i : i + grid[0], j : j + grid[1]]
        for i in range(size)
        for j in range(size)
    )
    return y.reshape(v.shape) + bias


def heads(x):
    return x.reshape(len(x), H, -1)


def products(q, k):
    return np.einsum("ihk,jhk->hij", q, k)


def weights(name, p, x, grid):
    """Returns the weights (H, n, n) of a document x (n, D)."""
    n, s = len(x), K**-0.5
    if name == "linfusion":
        q, k = (dense(p[c], x + linfusion_mlp(p, c, x)) for c in "qk")
    else:
        q, k = (dense(p[c], x) for c in "qk")
    if name == "sana_video":
        q, k = (rms(z, 1e-5, p[f"{c}_norm"]["scale"]) for c, z in (("q", q), ("k", k)))
    if name == "slab":
        k = k + p["k_positions"]["embedding"]
    q, k = heads(q), heads(k)
    if name == "nalaformer":
        q, k = norm_power(q), signed_cube(k)
    elif name != "inline":
        phi = relu if name in ("lit", "sana_video", "slab") else elu_plus_one
        q, k = phi(q), phi(k)
    if name == "rala":
        logits = s * np.einsum("hk,jhk->jh", q.mean(axis=0), k)
        k = k * (n * special.softmax(logits, axis=0))[..., None]
    plain, mean = products(q, k), products(q, k).mean(axis=-1, keepdims=True)
    if name in ("mala", "nalaformer", "rala"):
        plain = products(turned(q, grid, 1e-4), turned(k, grid, 1e-4))
    if name == "sana_video":  # base^(-i/2) of two pairs
        plain = products(turned(q, grid, 1e-2), turned(k, grid, 1e-2))
    if name == "inline":
        return (s * plain - s * mean + 1) / n
    if name == "mala":
        return ((1 + 1 / (s * mean + 1e-6)) * s * plain - s * mean) / n
    if name in ("nalaformer", "rala", "linfusion"):
        return plain / (n * (mean + (1e-4 if name == "linfusion" else 1e-6)))
    return plain / (n * mean + (1e-15 if name == "sana_video" else 1e-6))


def linfusion_mlp(p, c, x):
    norm = p[f"{c}_norm"]["norm"]
    h = layer_norm(dense(p[f"{c}_in"], x), 1e-5, norm["scale"], norm["bias"])
    return dense(p[f"{c}_out"], np.where(h > 0, h, 0.01 * h))


def output(name, p, x, grid):
    """Returns y of a document x (n, D)."""
    v = dense(p["v"], x)
    o = np.einsum("hij,jhk->ihk", weights(name, p, x, grid), heads(v)).reshape(len(x), -1)
    if name == "inline":
        mean = x.mean(axis=0).reshape(H, -1)
        hidden = np.einsum("hd,hdf->hf", mean, p["local_hidden"]["kernel"])
        hidden = hidden + p["local_hidden"]["bias"]
        hidden = hidden * special.ndtr(hidden)
        taps = np.einsum("hd,hdf->hf", hidden, p["local"]["kernel"]) + p["local"]["bias"]
        o = o + convolved(v, taps.reshape(D, 9).T, 0.0, grid)
    elif "local" in p:
        repeats = D // p["local"]["kernel"].shape[-1]
        taps, bias = (np.tile(p["local"][c], repeats) for c in ("kernel", "bias"))
        o = o + convolved(v, taps, bias, grid)
    if name == "nalaformer":
        norm = p["o_norm"]["norm"]
        o = layer_norm(o, 1e-5, norm["scale"], norm["bias"]) * silu(dense(p["g"], x))
    elif name in ("mala", "rala"):
        o = o * dense(p["g"], x)
    return dense(p["o"], o)


@pytest.mark.parametrize("name", SYSTEMS)
def test_equations(name):
    """Two packed documents, whose weights are each an explicit matrix."""
    mixer, _, params = make(name, grid=GRID, num_heads=H)
    x = normal(1, 2 * N, D)
    y, _ = apply(mixer, params, x, jnp.repeat(jnp.array([[1, 2]]), N, axis=1))
    for tokens in (slice(0, N), slice(N, 2 * N)):
        expected = output(name, params, x[0, tokens], GRID)
        np.testing.assert_allclose(y[0, tokens], expected, rtol=1e-4, atol=1e-4)
    alone, _ = apply(mixer, params, x[:, :N])
    np.testing.assert_allclose(alone[0], y[0, :N], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_weights_of_a_token_sum_to_one_without_rotation(name):
    """Values that are all 1 give outputs that are all 1."""
    plain = {"rope_base": None, "local": None, "gate": None, "output_norm": None}
    mixer, _, params = make(name, grid=GRID, **plain)
    ones = np.zeros((D, D))
    ones[0] = 1.0  # x's first channel is 1
    params["v"] = {"kernel": ones} | ({"bias": np.zeros(D)} if "bias" in params["v"] else {})
    params["o"] = {"kernel": np.eye(D), "bias": np.zeros(D)}
    x = normal(1, N, D)
    x[..., 0] = 1.0
    y, _ = apply(mixer, params, x)
    np.testing.assert_allclose(y, np.ones_like(y), atol=2e-4)


# ------------------------------------------------------------------ what sets them apart


def weights_of(mixer, q_CNK, k_NK):
    """Returns the weights (C, n, n) that a mixer without rotation gives C rows of queries."""
    C, n, _ = q_CNK.shape
    k_CNK = np.broadcast_to(k_NK, (C, n, K))
    identity = jnp.tile(jnp.eye(n), (C, 1, 1))[:, :, None]
    read = functools.partial(operators.document_sums, scale=1.0)

    @jax.jit
    def run(q, k):
        q_CN1F, k_CN1F = (
            feature_maps.FeatureMap(kind).apply({}, x[:, :, None])
            for kind, x in ((mixer.q_map, q), (mixer.k_map or mixer.q_map, k))
        )
        count = jnp.full((C, n, 1, 1), float(n))
        return mixer.corrected(read, q_CN1F, k_CN1F, identity, count, None)[0]

    return np.asarray(run(jnp.float32(q_CNK), jnp.float32(k_CNK))[:, :, 0])


def one_head(name, **options):
    return mixers.make(name, d_model=K, num_heads=1, rope_base=None, **options)


def multiples(q, *factors):
    return np.stack([c * q for c in factors])


def test_inline_tells_apart_queries_that_are_multiples_of_each_other():
    """Division by the sum gives 2 q the weights of q; InLine's differ by s q . (k - mean k) / n."""
    q, k = normal(N, K), normal(N, K, seed=2)
    same = weights_of(one_head("whole_document", q_map="relu"), multiples(q, 1, 2), k)
    np.testing.assert_allclose(*same, atol=1e-6)
    once, twice = weights_of(one_head("inline"), multiples(q, 1, 2), k)
    s_k = K**-0.5 * (k - k.mean(axis=0))
    np.testing.assert_allclose(twice - once, q @ s_k.T / N, atol=1e-6)
    assert np.abs(twice - once).max(axis=1).min() > 0.01


def test_malas_weights_grow_apart_with_the_querys_norm():
    q, k = np.abs(normal(N, K)), normal(N, K, seed=2)
    spread = np.ptp(weights_of(one_head("mala"), multiples(q, 1, 2, 4, 8), k), axis=-1)
    assert np.all(np.diff(spread, axis=0) > 0.01)
    linear = weights_of(one_head("whole_document", q_map="relu"), multiples(q, 1, 8), k)
    np.testing.assert_allclose(*linear, atol=1e-6)


def test_ralas_key_weights_sum_to_the_number_of_tokens():
    mixer = one_head("rala")
    q, k = (jnp.asarray(elu_plus_one(normal(2, 2 * N, 1, K, seed=s)), jnp.float32) for s in (1, 2))
    ids = np.repeat([[1, 2], [3, 3]], N, axis=1)
    count = np.array([[N, N], [2 * N, 2 * N]]).repeat(N, axis=1)[..., None, None]
    weighted = jax.jit(lambda q, k: mixer.weighted(q, k, jnp.float32(count), ids))
    weight = np.asarray(weighted(q, k) / k)
    for row, tokens in ((0, slice(0, N)), (0, slice(N, 2 * N)), (1, slice(0, 2 * N))):
        total = weight[row, tokens].sum(axis=0)
        np.testing.assert_allclose(
            total, np.full_like(total, count[row, tokens][0, 0, 0]), rtol=1e-5
        )
    assert weight.max() > 1.2  # not all keys weigh the same
    assert np.isfinite(weighted(q, 1e3 * k)).all()  # logits beyond the range of exp


def test_slabs_positions_start_without_effect():
    mixer, first, noisy = make("slab", grid=GRID)
    x = normal(1, N, D)
    assert not np.any(first["k_positions"]["embedding"])
    without = {key: value for key, value in first.items() if key != "k_positions"}
    plain = mixers.make("whole_document", d_model=D, grid=GRID, **without_positions(mixer))
    assert np.array_equal(apply(mixer, first, x)[0], apply(plain, without, x)[0])
    moved = first | {"k_positions": noisy["k_positions"]}
    assert np.abs(apply(mixer, moved, x)[0] - apply(plain, without, x)[0]).max() > 1e-3


def without_positions(slab):
    options = mixers.options("slab")
    return {name: getattr(slab, name) for name in options if name not in ("d_model", "grid")}


def test_linfusion_does_not_see_the_resolution():
    """Every token twice gives every output twice, but for sums that are not divided."""
    x = normal(2, N, D)
    for correction in ("over_mean", "none"):
        mixer, _, params = make("linfusion", correction=correction)
        once, twice = (apply(mixer, params, np.repeat(x, n, axis=1))[0] for n in (1, 2))
        difference = np.abs(twice[:, ::2] - once).max()
        assert difference < 1e-5 if correction == "over_mean" else difference > 0.1


def test_sana_videos_blocks():
    """A token reads its own block and earlier ones: masked weights, one call, and three pieces."""
    grid, block = (3, 2), 2
    mixer, _, p = make("sana_video", grid=grid, block_size=block)
    x = normal(1, N, D)
    y, last = apply(mixer, p, x)
    q, k = (relu(rms(dense(p[c], x[0]), 1e-5, p[f"{c}_norm"]["scale"])) for c in "qk")
    q, k, v = heads(q), heads(k), heads(dense(p["v"], x[0]))
    index = np.arange(N) // block
    seen = index[:, None] >= index
    turned_products = products(turned(q, grid, 1e-2), turned(k, grid, 1e-2)) * seen
    weight = turned_products / np.sum(products(q, k) * seen, axis=-1, keepdims=True)
    o = np.einsum("hij,jhk->ihk", weight, v).reshape(N, D)
    np.testing.assert_allclose(y[0], dense(p["o"], o), rtol=1e-4, atol=1e-4)
    state, pieces = mixer.init_state(1), []
    shapes = jax.tree.map(jnp.shape, state)
    for tokens in (slice(0, 2), slice(2, 6)):
        piece, state = apply(mixer, p, x[:, tokens], None, state)
        pieces.append(piece)
        assert jax.tree.map(jnp.shape, state) == shapes
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), y, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), state, last)
    np.testing.assert_allclose(last.k_sum_BHF1[0, :, :, 0], k.sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", ["inline_causal", "mala_causal"])
def test_causal_forms(name):
    """Means and counts run over the tokens so far of a token's own document."""
    mixer, _, p = make(name)
    x, lengths = normal(1, 9, D), (3, 6)
    y, _ = apply(mixer, p, x, jnp.asarray(np.repeat([[1, 2]], lengths, axis=1)))
    start, s = 0, K**-0.5
    for n in lengths:
        document = x[0, start : start + n]
        q, k, v = (heads(dense(p[c], document)) for c in "qkv")
        if name == "mala_causal":
            q, k = elu_plus_one(q), elu_plus_one(k)
        t, seen = np.arange(1, n + 1)[:, None], np.tri(n)
        z = s * np.sum(products(q, k) * seen, axis=-1, keepdims=True) / t
        plain = s * products(rope(q), rope(k))
        if name == "inline_causal":
            weight = (plain - z + 1) / t
        else:
            weight = ((1 + 1 / (z + 1e-6)) * plain - z) / t
        o = np.einsum("hij,jhk->ihk", weight * seen, v).reshape(n, D)
        if name == "mala_causal":
            o = o * dense(p["g"], document)
        np.testing.assert_allclose(y[0, start : start + n], dense(p["o"], o), rtol=1e-4, atol=1e-4)
        start += n


def rope(x):
    angle = np.arange(len(x))[:, None, None] * 1e4 ** (-np.arange(K // 2) / (K // 2))
    z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_tokens_with_coordinates_may_come_in_any_order():
    mixer, _, params = make("mala", local=None)
    x, order = normal(1, N, D), np.array([3, 0, 5, 1, 4, 2])
    place = jnp.asarray(np.stack(np.divmod(np.arange(N), 3), axis=-1))[None]
    y, _ = apply(mixer, params, x, layer=mixers.Layer(0, 1, coordinates_BTA=place))
    layer = mixers.Layer(0, 1, coordinates_BTA=place[:, order])
    np.testing.assert_allclose(
        apply(mixer, params, x[:, order], layer=layer)[0], y[:, order], atol=1e-5
    )
    on_grid = mixers.make("mala", d_model=D, local=None, grid=(2, 3))
    np.testing.assert_allclose(apply(on_grid, params, x)[0], y, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"correction": "inlined"}, "mala: correction is 'inlined'; choose one of inline, mala"),
        ({"gate": "relu"}, "mala: gate is 'relu'; choose one of identity, silu"),
        ({"k_map": "norm_power"}, "mala: q_map 'elu_plus_one' gives 8 features and k_map .* 16"),
        ({"local": "predicted"}, "mala: local is 'predicted'; choose one of depthwise, shared"),
        ({"grid": (2, 2)}, r"mala: grid \(2, 2\) has 4 tokens, but a row has 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(options, message):
    mixer = mixers.make("mala", d_model=D, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, N, D)))
