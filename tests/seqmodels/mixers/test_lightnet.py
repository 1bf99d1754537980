"""LightNet: its running softmax in float64, extreme keys, one pass over whole documents."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.mixers import lightnet
from seqmodels.modules import documents, grids

SEGMENT_IDS_BT = np.repeat([1, 2, 1, 0], [6, 1, 9, 4])[None].astype(np.int32)
T, D = SEGMENT_IDS_BT.shape[1], 8
DOCUMENT_T = np.repeat(np.arange(4), [6, 1, 9, 4])
SAME_TS = DOCUMENT_T[:, None] == DOCUMENT_T[None]
CAUSAL_TS = SAME_TS & (np.arange(T)[None] <= np.arange(T)[:, None])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def weights(k_SHK, seen_TS):
    """softmax over the seen tokens s of k, for each t, head and channel: (T, S, H, K)."""
    k_TSHK = np.where(seen_TS[..., None, None], k_SHK[None], -np.inf)
    e_TSHK = np.exp(k_TSHK - k_TSHK.max(axis=1, keepdims=True))
    return e_TSHK / e_TSHK.sum(axis=1, keepdims=True)


def initial(name, **options):
    mixer = mixers.make(name, d_model=D, num_heads=2, gate_rank=3, **options)
    x_BTD = jnp.zeros((1, T, D))
    init = jax.jit(mixer.init)(jax.random.key(0), x_BTD, SEGMENT_IDS_BT)
    return mixer, nn.unbox(init)["params"]


def by_definition(params, x_TD, seen_TS, turn=lambda x: x):
    """The equations of the docstring with all weights written out, in float64."""
    p = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()
         if name != "o_norm"}  # fmt: skip

    def silu(x):
        return x / (1 + np.exp(-x))

    q, k, v = ((x_TD @ p[name]).reshape(T, 2, D // 2) for name in "qkv")
    q = silu(q)
    # Rotations act on q and on the weights of each pair of tokens alike.
    scores = np.einsum("thk,tshk->ths", turn(q), turn(weights(k, seen_TS)))
    o_TD = np.einsum("ths,shv->thv", scores, v).reshape(T, D)
    o_TD /= np.sqrt(np.mean(np.square(o_TD), axis=-1, keepdims=True) + 1e-5)
    return (o_TD * silu(x_TD @ p["g_down"] @ p["g_up"])) @ p["o"]


def test_keys_are_a_running_softmax():
    """The recurrence's outputs are those of softmax over time, written out in float64."""
    mixer, params = initial("lightnet")
    x_TD = normal(T, D)
    found, _ = mixer.apply({"params": params}, jnp.asarray(x_TD[None], jnp.float32), SEGMENT_IDS_BT)
    np.testing.assert_allclose(found[0], by_definition(params, x_TD, CAUSAL_TS), atol=2e-5)


@pytest.mark.parametrize("rope_base", [None, 50.0])
def test_one_pass_over_whole_documents(rope_base):
    grid = (3, 2)
    mixer, params = initial("lightnet_nd", rope_base=rope_base, grid=grid)
    x_TD = normal(T, D)
    found, _ = mixer.apply({"params": params}, jnp.asarray(x_TD[None], jnp.float32), SEGMENT_IDS_BT)
    place_BTA = grids.coordinates(1, T, SEGMENT_IDS_BT, grid)

    def turn(x):
        """Rotates x (T, H, K), or x (T, S, H, K) of pairs, by the places of its tokens T or S."""
        if rope_base is None:
            return x
        x = jnp.asarray(x).reshape(-1, T, 2, D // 2)
        places = jnp.broadcast_to(place_BTA, (*x.shape[:2], 2))
        y = np.asarray(grids.rope_nd(x, places, rope_base, "lrpe"))
        return y if len(y) > 1 else y[0]

    expected = by_definition(params, x_TD, SAME_TS, turn)
    np.testing.assert_allclose(found[0], expected, atol=2e-5)
    if rope_base is None:  # a document's last token has seen the whole of it
        causal = mixers.make("lightnet", d_model=D, num_heads=2, gate_rank=3)
        y_BTD, _ = causal.apply({"params": params}, x_TD[None].astype(np.float32), SEGMENT_IDS_BT)
        last_T = np.flatnonzero(np.diff(DOCUMENT_T, append=9))
        np.testing.assert_allclose(found[0, last_T], y_BTD[0, last_T], atol=1e-5)


@pytest.mark.parametrize("size", [pytest.param(1.0, marks=pytest.mark.slow), 80.0])
def test_running_softmax_is_stable(size):
    """Weights and decays in float32 are those of float64 for keys of +-80 and documents of both.

    Nothing overflows, decays are never above 0, and gradients are finite.
    """
    rng = np.random.default_rng(0)
    k_THK = normal(T, 1, 3) + size * rng.choice([-1.0, 1.0], (T, 1, 3))
    k_THK[:6] -= size  # a document far below the others
    k_BTHK = jnp.asarray(k_THK[None], jnp.float32)
    empty = jnp.full((1, 1, 3), -jnp.inf)
    weight, log_decay, z_BHK = lightnet.running_softmax(k_BTHK, empty, SEGMENT_IDS_BT)
    exact = weights(np.asarray(k_BTHK[0], np.float64), CAUSAL_TS)
    own = exact[np.arange(T), np.arange(T)]
    np.testing.assert_allclose(weight[0], own, rtol=1e-4, atol=1e-30)
    assert np.all(log_decay <= 0)
    np.testing.assert_allclose(np.exp(log_decay[0]) + weight[0], 1.0, atol=1e-6)
    last = np.asarray(k_BTHK[0, -4:], np.float64)
    np.testing.assert_allclose(z_BHK[0], np.log(np.exp(last).sum(axis=0)), rtol=1e-6)
    whole = documents.softmax(k_BTHK, SEGMENT_IDS_BT)
    exact = weights(np.asarray(k_BTHK[0], np.float64), SAME_TS)
    np.testing.assert_allclose(whole[0], exact[np.arange(T), np.arange(T)], rtol=1e-4, atol=1e-30)

    def total(k_BTHK):
        weight, log_decay, _ = lightnet.running_softmax(k_BTHK, empty, SEGMENT_IDS_BT)
        whole = documents.softmax(k_BTHK, SEGMENT_IDS_BT)
        return jnp.sum(jnp.sin(weight) + jnp.exp(log_decay) ** 2 + whole**2)

    assert np.isfinite(jax.grad(total)(k_BTHK)).all()


def test_decay_saturates():
    """With even keys the decay of token t is 1 - 1/t: all tokens so far weigh the same."""
    empty = jnp.full((1, 1, 1), -jnp.inf)
    weight, log_decay, _ = lightnet.running_softmax(jnp.zeros((1, 50, 1, 1)), empty, None)
    np.testing.assert_allclose(weight[0, :, 0, 0], 1 / np.arange(1, 51), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_decay[0, :, 0, 0]), 1 - 1 / np.arange(1, 51), atol=1e-6)
