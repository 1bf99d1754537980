"""Token mixing by weights of positions against its definitions: MLP-Mixer, Sparse-MLP, shallow FFN.

Equations are written out once more in NumPy float64. What all mixers share is in `mixer_suite.py`
and `document_suite.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model, mixers
from seqmodels.mixers import mlp_mixer
from seqmodels.modules import blocks, channel_routing, padded_documents, pattern
from seqmodels.text import sampling

B, T, D = 2, 6, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def make(name, **options):
    """Returns the mixer and its first parameters plus noise, in NumPy."""
    mixer = mixers.make(name, d_model=D, **options)
    first = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, T, D))))["params"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda p: np.asarray(p + 0.1 * rng.standard_normal(p.shape)), first)
    return mixer, noisy


def apply(mixer, params, x, *arguments, **keywords):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    run = jax.jit(functools.partial(mixer.apply, **keywords))
    return jax.tree.map(
        np.asarray, run({"params": params}, jnp.asarray(x, jnp.float32), *arguments)
    )


def gelu(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def mlp(p, x):
    hidden = gelu(x @ p["up"]["kernel"] + p["up"]["bias"])
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_token_mixing_is_a_wide_mlp_with_a_kronecker_product():
    mixer, params = make("mlp_mixer", max_length=T, hidden=5)
    p, x = params["token_mixing"], normal(B, T, D)
    eye = np.eye(D)
    wide_up = np.kron(p["up"]["kernel"].T, eye)
    wide_down = np.kron(p["down"]["kernel"].T, eye)
    hidden = gelu(x.reshape(B, -1) @ wide_up.T + np.repeat(p["up"]["bias"], D))
    expected = hidden @ wide_down.T + np.repeat(p["down"]["bias"], D)
    y, _ = apply(mixer, params, x)
    np.testing.assert_allclose(y, expected.reshape(B, T, D), rtol=1e-4, atol=1e-5)


def test_a_block_of_vit_jax_by_its_names():
    rng, hidden, wide = np.random.default_rng(1), 4, 12

    def dense(*shape):
        return {"kernel": rng.standard_normal(shape) / 3, "bias": rng.standard_normal(shape[1])}

    def norm():
        return {"scale": rng.standard_normal(D), "bias": rng.standard_normal(D)}

    theirs = {
        "LayerNorm_0": norm(),
        "token_mixing": {"Dense_0": dense(T, hidden), "Dense_1": dense(hidden, T)},
        "LayerNorm_1": norm(),
        "channel_mixing": {"Dense_0": dense(D, wide), "Dense_1": dense(wide, D)},
    }

    def their_mlp(p, x):
        hidden = gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    x = normal(B, T, D)
    h = layer_norm(x, **theirs["LayerNorm_0"])
    expected = x + np.swapaxes(their_mlp(theirs["token_mixing"], np.swapaxes(h, 1, 2)), 1, 2)
    h = layer_norm(expected, **theirs["LayerNorm_1"])
    expected = expected + their_mlp(theirs["channel_mixing"], h)

    spec = pattern.MixerSpec("mlp_mixer", (("max_length", T), ("hidden", hidden)))
    block = blocks.Block(spec, D, "gelu", wide, channel_bias=True, norm="layer_norm")
    params = mlp_mixer.from_vit_jax(theirs)
    y, _ = apply(block, params, x, None, None, None, mixers.Layer(0, 1))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_shorter_documents_are_padded_and_longer_ones_are_cut():
    mixer, params = make("mlp_mixer", max_length=T)
    x = normal(B, T + 3, D)
    padded = x[:, :T] * (np.arange(T) < 2)[None, :, None]
    short, _ = apply(mixer, params, x[:, :2])
    np.testing.assert_allclose(short, apply(mixer, params, padded)[0][:, :2], rtol=1e-5, atol=1e-6)
    cut, _ = apply(mixer, params, x, jnp.ones((B, T + 3), jnp.int32))
    np.testing.assert_allclose(cut[:, :T], apply(mixer, params, x[:, :T])[0], rtol=1e-5, atol=1e-6)
    assert not cut[:, T:].any()
    causal = mixers.make("mlp_mixer_causal", d_model=D, max_length=T)
    with pytest.raises(ValueError, match="mlp_mixer_causal: a document of 9 tokens, and max_len"):
        causal.init(jax.random.key(0), x, jnp.ones((B, T + 3), jnp.int32))
    with pytest.raises(ValueError, match="mlp_mixer: a document of 9 tokens, and max_length is 6"):
        mixer.apply({"params": params}, jnp.zeros((1, T + 3, D)))
    with pytest.raises(ValueError, match=r"mlp_mixer: grid \(2, 4\) has 8 tokens, but a row has 6"):
        mixers.make("mlp_mixer", d_model=D, grid=(2, 4)).init(
            jax.random.key(0), jnp.zeros((1, T, D))
        )


def test_the_order_of_a_grids_tokens_is_that_of_their_coordinates():
    mixer, params = make("mlp_mixer", grid=(2, 3))
    x, order = normal(B, T, D), np.array([4, 0, 5, 2, 1, 3])
    coordinates = np.stack([order // 3, order % 3], axis=-1)[None].repeat(B, 0)
    layer = mixers.Layer(0, 1, coordinates_BTA=jnp.asarray(coordinates, jnp.int32))
    y, _ = apply(mixer, params, x[:, order], layer=layer)
    np.testing.assert_allclose(y, apply(mixer, params, x)[0][:, order], rtol=1e-5, atol=1e-6)


def test_the_causal_mlp_is_one_with_masked_weights():
    mixer, params = make("mlp_mixer_causal", max_length=T, expand=2)
    p, x = jax.tree.map(np.copy, params["token_mixing"]), normal(B, T, D)
    for t in range(T):
        for f in range(2 * T):
            p["up"]["kernel"][t, f] *= t <= f // 2
            p["down"]["kernel"][f, t] *= f // 2 <= t
    expected = np.swapaxes(mlp(p, np.swapaxes(x, 1, 2)), 1, 2)
    y, _ = apply(mixer, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [("sparse_mlp", "mlp_mixer"), ("sparse_mlp_causal", "mlp_mixer_causal")],
)
def test_one_expert_is_the_dense_mixer(sparse, dense):
    options = {"max_length": T} | ({"re_represent": False} if sparse == "sparse_mlp" else {})
    mixer, params = make(sparse, num_experts=1, **options)
    mlp_params = jax.tree.map(lambda p: p[0], params["token_mixing"])
    x = normal(B, T, D)
    y, _ = apply(mixer, params, x)
    expected, _ = apply(make(dense, max_length=T)[0], {"token_mixing": mlp_params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_sparse_mlp_routes_channels_and_reports_their_balance():
    X = 3
    mixer, params = make("sparse_mlp", max_length=T, num_experts=X, hidden=4)
    x = normal(B, T, D)
    # Twice the tokens and half the channels; a row is one channel of the whole document.
    weights = {name: params[name]["kernel"] for name in params if name != "token_mixing"}
    rows = np.einsum("BMD,MN,DE->BEN", x, weights["before_tokens"], weights["before_channels"])
    logits = rows @ weights["router"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expert = p.argmax(-1)
    y = np.zeros_like(rows)
    for b, e in np.ndindex(expert.shape):
        own = jax.tree.map(lambda w, b=b, e=e: w[expert[b, e]], params["token_mixing"])
        y[b, e] = p[b, e].max() * mlp(own, rows[b, e])
    expected = np.einsum("BEN,NM,ED->BMD", y, weights["after_tokens"], weights["after_channels"])
    (found, _), sown = apply(mixer, params, x, mutable="losses")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # The losses; noise of standard deviation 1/X decides ties of the load.
    above = (logits - logits.max(-1, keepdims=True)) * X
    load = np.asarray(jax.scipy.stats.norm.cdf(above)).sum((0, 1))
    importance = p.sum((0, 1))
    variation = sum(z.var() / z.mean() ** 2 for z in (importance, load))
    (balance,) = sown["losses"]["balance"]
    np.testing.assert_allclose(balance, 0.01 * 0.5 * variation, rtol=1e-4)


def test_noise_of_the_router_needs_a_random_stream():
    mixer, params = make("sparse_mlp", max_length=T, num_experts=3)
    x = 0.01 * normal(B, T, D)  # logits near 0: noise decides
    still = [apply(mixer, params, x)[0] for _ in range(2)]
    noisy = [apply(mixer, params, x, rngs={"noise": jax.random.key(i)})[0] for i in range(2)]
    np.testing.assert_array_equal(*still)
    assert np.any(noisy[0] != noisy[1])


def test_capacity_serves_the_largest_weights_first():
    expert, weight = jnp.array([[0, 0, 1, 0, 0, 1]]), jnp.array([[0.6, 0.9, 0.5, 0.7, 0.8, 0.4]])
    choice = channel_routing.Choice(expert, weight, {})
    # ceil(1.0 * 6 / 3) = 2 rows for each of three experts.
    served = channel_routing.within_capacity(choice, 3, 1.0).weight
    np.testing.assert_allclose(served, [[0.0, 0.9, 0.5, 0.0, 0.8, 0.4]])
    assert channel_routing.within_capacity(choice, 3, None) is choice


def test_padding_does_not_count_in_the_balance():
    mixer, params = make("sparse_mlp", max_length=T, num_experts=3)
    x = normal(B, T, D)
    ids = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2]])
    padded, other = x.copy(), np.where(ids == 2, 0, ids)
    padded[:, 4:] *= 7.0
    losses = [
        apply(mixer, params, z, jnp.asarray(s, jnp.int32), mutable="losses")[1]["losses"]["balance"]
        for z, s in ((x, other), (padded, other), (x, ids))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def shallow(p, x):
    """Returns the network's results (N, H, O) for sentences x (N, W)."""
    hidden = layer_norm(x[:, None], p["norm_scale"], p["norm_bias"])
    hidden = np.einsum("NHW,HWF->NHF", hidden, p["up"]["kernel"]) + p["up"]["bias"]
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    hidden = layer_norm(hidden, p["hidden_norm_scale"], p["hidden_norm_bias"])
    return np.einsum("NHF,HFO->NHO", hidden, p["down"]["kernel"]) + p["down"]["bias"]


@pytest.mark.parametrize("size", ["m", "xl"])
def test_shallow_ffn_maps_the_whole_sentence(size):
    mixer, params = make("shallow_ffn", max_length=T, size=size)
    hidden = {"m": T * D // 8, "xl": 2 * T * D}[size]
    assert params["network"]["up"]["kernel"].shape == (1, T * D, hidden)
    x = normal(B, T, D)
    y, _ = apply(mixer, params, x)
    expected = shallow(params["network"], x.reshape(B, -1)).reshape(B, T, D)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_shallow_ffn_per_head():
    mixer, params = make("shallow_ffn", max_length=T, size="m", num_heads=2)
    x = normal(B, T, D)
    heads = shallow(params["network"], x.reshape(B, -1)).reshape(B, 2, T, D // 2)
    expected = np.swapaxes(heads, 1, 2).reshape(B, T, D) @ params["o"]["kernel"]
    y, _ = apply(mixer, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_causal_shallow_ffn_reads_prefixes():
    M = 4
    mixer, params = make("shallow_ffn_causal", max_length=M, size="m")
    x = normal(B, T, D)
    y, _ = apply(mixer, params, x)
    for t in range(T):
        prefix = np.zeros((B, M, D))
        seen = x[:, max(0, t - M + 1) : t + 1]
        prefix[:, : seen.shape[1]] = seen
        expected = shallow(params["network"], prefix.reshape(B, -1))[:, 0]
        np.testing.assert_allclose(y[:, t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shallow_ffn", "shallow_ffn_causal"])
def test_shallow_ffn_of_one_token_is_an_mlp(name):
    mixer = mixers.make(name, d_model=D, max_length=1)
    _, params = make("shallow_ffn_causal", max_length=1)
    x = normal(B, 1, D)
    y, _ = apply(mixer, params, x)
    np.testing.assert_allclose(y, shallow(params["network"], x[:, 0]), rtol=1e-4, atol=1e-4)


def test_documents_are_padded_one_by_one():
    x = jnp.asarray(normal(2, 7, 3), jnp.float32)
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 3, 4, 4, 4, 4]], jnp.int32)

    def total(x_BMD, seen_BM, run):
        return jnp.cumsum(x_BMD, axis=1), jnp.sum(seen_BM, dtype=jnp.float32)

    position = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 0, 1, 2, 3]], np.int32)
    run = jax.jit(functools.partial(padded_documents.each_document, total), static_argnums=2)
    y, count = run(x, ids, 3, position_BT=jnp.asarray(position))
    expected = np.zeros_like(x)
    for b in range(2):
        for i in set(ids[b].tolist()):
            (where,) = np.nonzero(ids[b] == i)
            expected[b, where[:3]] = np.cumsum(x[b, where[:3]], axis=0)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert count == 12  # the fourth token of the two long documents is not seen


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp_mixer", {"max_length": 0}, "max_length must be at least 1; got 0"),
        ("mlp_mixer", {"implementation": "chunked"}, "there is one form of it"),
        ("mlp_mixer_causal", {"expand": 0}, "expand must be at least 1; got 0"),
        ("sparse_mlp", {"num_experts": 0}, "num_experts must be at least 1; got 0"),
        ("sparse_mlp", {"capacity_factor": 0.0}, "capacity_factor is 0.0; it must be more than 0"),
        ("shallow_ffn", {"size": "xxl"}, "size is 'xxl'; choose one of 'xs' .*'l'"),
        ("shallow_ffn", {"size": "xs", "max_length": 6}, "size 'xs' has W / 256 .*= 48 is less"),
        ("shallow_ffn", {"num_heads": 3}, "num_heads 3 must divide d_model 8"),
    ],
)
def test_errors_name_what_was_given(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        mixers.make(name, d_model=D, **options).init(jax.random.key(0), jnp.zeros((1, T, D)))


def test_language_models_know_how_far_positions_reach():
    config = {"vocab_size": 8, "d_model": D, "num_layers": 1, "pattern": "mlp_mixer_causal"}
    limit = sampling.context_limit(language_model.from_config(config))
    assert limit == (64, "the weights of mlp_mixer_causal layers, max_length=64")
