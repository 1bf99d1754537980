"""Every feature map against its formula in float64, where it starts, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.modules import feature_maps

B, T, H, K = 2, 3, 2, 4
LEARNED = ("hedgehog_joint", "hedgehog_paper", "hedgehog_softmax", "t2r")
FIXED = sorted(set(feature_maps.names()) - set(LEARNED))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def norm(z):
    return np.linalg.norm(z, axis=-1, keepdims=True)


def power(z):
    return 3 * (0.5 + np.tanh(norm(z)))


def both(f, z):
    return np.concatenate([f(z), f(-z)], axis=-1)


FORMULAS = {
    "identity": lambda z: z,
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "elu_plus_one": lambda z: np.where(z > 0, z + 1, np.exp(z)),
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "softmax": softmax,
    "t2r": lambda z: np.maximum(z, 0),
    "hedgehog_paper": lambda z: both(np.exp, z),
    "hedgehog_softmax": lambda z: np.maximum(both(softmax, z), 1e-12),
    "hedgehog_joint": lambda z: softmax(np.concatenate([2 * z, -2 * z], axis=-1)),
    "norm_power": lambda z: both(lambda u: np.maximum(u, 0) ** power(z), z / norm(z)),
    "signed_cube": lambda z: both(lambda z: np.maximum(z, 0), z**3),
}


def x_BTHK(scale=1.0):
    x = scale * np.random.default_rng(0).standard_normal((B, T, H, K))
    return jnp.asarray(x, jnp.float32)


def init(kind, features=None, heads=H, dim=K, key=0):
    module = feature_maps.FeatureMap(kind, features)
    params = nn.unbox(module.init(jax.random.key(key), jnp.zeros((1, 1, heads, dim))))
    return module, params.get("params", {})


def test_there_is_a_formula_for_every_map():
    assert sorted(FORMULAS) == feature_maps.names()


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_maps(kind):
    module, params = init(kind)
    assert not params
    expected = FORMULAS[kind](np.asarray(x_BTHK(3.0), np.float64))
    actual = module.apply({}, x_BTHK(3.0))
    width = 2 * K if kind in ("norm_power", "signed_cube") else K
    assert actual.shape[-1] == feature_maps.output_dim(kind, K) == width
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("features", [None, 3])
def test_learned_maps(kind, features):
    module, params = init(kind, features)
    E = features or K
    bias = {"t2r": (H, 1), "hedgehog_softmax": None}.get(kind, (H, E))
    shapes = {"kernel": (H, K, E)} | ({"bias": bias} if bias else {})
    assert {name: p.shape for name, p in params.items()} == shapes
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in params.items()}
    z = np.stack([np.asarray(x_BTHK())[:, :, h] @ params["kernel"][h] for h in range(H)], axis=2)
    if bias:
        z = z + params["bias"]
    actual = module.apply({"params": params}, x_BTHK())
    assert actual.shape[-1] == feature_maps.output_dim(kind, K, features)
    np.testing.assert_allclose(actual, FORMULAS[kind](z.astype(np.float64)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["hedgehog_joint", "hedgehog_paper", "hedgehog_softmax"])
def test_hedgehog_starts_as_the_identity(kind):
    for features in (None, 3):
        _, params = init(kind, features)
        np.testing.assert_array_equal(params["kernel"], np.stack([np.eye(K, features or K)] * H))
        assert not np.any(params.get("bias", 0.0))


def test_t2r_starts_kaiming_uniform():
    _, params = init("t2r", 200, heads=3, dim=50)
    bound = np.sqrt(6 / 50)
    kernel = np.asarray(params["kernel"])
    assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.99 * bound
    assert abs(kernel.mean()) < 0.01 * bound and abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.02
    assert not np.any(params["bias"])


def test_the_three_hedgehogs_differ():
    sums = {}
    for kind in LEARNED[:3]:
        module, params = init(kind)
        phi = module.apply({"params": params}, x_BTHK())
        sums[kind] = np.asarray(phi.sum(axis=-1))
    np.testing.assert_allclose(sums["hedgehog_softmax"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(sums["hedgehog_joint"], 1.0, rtol=1e-6)
    assert sums["hedgehog_paper"].std() > 0.1


@pytest.mark.parametrize("kind", feature_maps.names())
def test_signs_and_gradients(kind):
    module, params = init(kind)
    scale = 10.0 if kind == "hedgehog_paper" else 1e4

    def total(params, x):
        phi = module.apply({"params": params}, x)
        return jnp.sum(phi * jnp.cos(jnp.arange(phi.size)).reshape(phi.shape)), phi

    phi = module.apply({"params": params}, x_BTHK())
    assert bool(jnp.all(phi >= 0)) == feature_maps.is_nonnegative(kind)
    (_, phi), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x_BTHK(scale))
    for leaf in (phi, *jax.tree.leaves(grads)):
        assert np.isfinite(leaf).all()


def test_heads_have_maps_of_their_own():
    module, params = init("hedgehog_joint")
    changed = {"kernel": params["kernel"].at[1].add(0.5), "bias": params["bias"]}
    before, after = (module.apply({"params": p}, x_BTHK()) for p in (params, changed))
    np.testing.assert_array_equal(before[:, :, 0], after[:, :, 0])
    assert np.abs(before[:, :, 1] - after[:, :, 1]).max() > 1e-2


def test_bfloat16_is_computed_in_float32():
    x = x_BTHK(5.0).astype(jnp.bfloat16)
    module, params = init("hedgehog_softmax")
    phi = module.apply({"params": params}, x)
    assert phi.dtype == jnp.bfloat16
    exact = module.apply({"params": params}, x.astype(jnp.float32))
    np.testing.assert_array_equal(phi, exact.astype(jnp.bfloat16))


def test_unknown_map_lists_the_choices():
    for call in (feature_maps.is_nonnegative, lambda name: feature_maps.output_dim(name, 4), init):
        with pytest.raises(ValueError, match="unknown feature map 'hedgehog'; choose one of .*t2r"):
            call("hedgehog")
