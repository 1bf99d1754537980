"""Sparse-linear attention against its definition, in NumPy float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.mixers import sparse_linear

B, T, D, H = 2, 14, 8, 2
IDS = np.array([[1] * 9 + [2] * 5, [1] + [2] * 12 + [3]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def make(**options):
    """Returns the mixer, its first parameters, and the same plus noise."""
    mixer = mixers.make("sparse_linear", d_model=D, num_heads=H, **options)
    init = jax.jit(functools.partial(mixer.init, segment_ids_BT=jnp.ones((1, T), jnp.int32)))
    first = nn.unbox(init(jax.random.key(0), jnp.zeros((1, T, D))))["params"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.standard_normal(p.shape)), first)
    return mixer, first, noisy


def apply(mixer, params, x, ids=IDS):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    y, _ = jax.jit(mixer.apply)({"params": params}, jnp.asarray(x, jnp.float32), ids)
    return np.asarray(y)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def heads(x, p, ids=IDS):
    """Yields (row, tokens, head, q, k, v) of each document and head."""
    q, k, v = ((x @ p[name]["kernel"]).reshape(B, T, H, -1) for name in "qkv")
    for b in range(B):
        for i in sorted(set(ids[b].tolist())):
            (tokens,) = np.nonzero(ids[b] == i)
            for h in range(H):
                yield b, tokens, h, *(z[b, tokens, h] for z in (q, k, v))


def chosen_tokens(q, k, size, topk):
    """Returns which tokens are chosen for which, (n, n) booleans, of one document and head."""
    block = np.arange(len(q)) // size
    N = block[-1] + 1
    mean_q, mean_k = (np.stack([z[block == n].mean(0) for n in range(N)]) for z in (q, k))
    scores = mean_q @ (mean_k - k.mean(0)).T
    wanted = max(1, int(topk * N + 1e-9))
    best = np.argsort(-scores, axis=-1)[:, :wanted]
    chosen = np.zeros((N, N), bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen[block][:, block]


@pytest.mark.parametrize("mode", sparse_linear.MODES)
def test_documents_by_the_definition(mode):
    size, topk = 3, 0.4
    mixer, _, p = make(block_size=size, topk=topk, mode=mode, rope_base=None)
    x = normal(B, T, D, seed=1)
    o = np.zeros((B, T, H, D // H))
    for b, tokens, h, q, k, v in heads(x, p):
        chosen = chosen_tokens(q, k, size, topk)
        if mode == "linear_only":
            chosen = np.zeros_like(chosen)
        logits = q @ k.T / np.sqrt(q.shape[-1])
        if mode != "linear_only":
            o[b, tokens, h] += softmax(np.where(chosen, logits, -np.inf)) @ v
        if mode != "sparse_only" and not chosen.all():
            # Directly over the tokens that are not chosen, not by subtraction.
            weights = np.where(chosen, 0.0, softmax(q) @ softmax(k).T)
            o_linear = weights @ v / (weights.sum(-1, keepdims=True) + 1e-5)
            if mode == "both":
                out = p["linear_out"]
                o_linear = o_linear @ out["kernel"] + out["bias"]
            o[b, tokens, h] += o_linear
    expected = o.reshape(B, T, D) @ p["o"]["kernel"]
    np.testing.assert_allclose(apply(mixer, p, x), expected, rtol=1e-4, atol=1e-4)


def test_all_blocks_are_softmax_attention_exactly():
    mixer, _, p = make(block_size=3, topk=1.0, grid=None)
    x = jnp.asarray(normal(B, T, D, seed=1), jnp.float32)
    ids, kernels = jnp.asarray(IDS, jnp.int32), {name: p[name] for name in "qkvo"}
    attention = mixers.make("full_attention", d_model=D, num_heads=H, rope_base=10_000.0)
    expected, _ = attention.apply({"params": kernels}, x, ids)
    np.testing.assert_allclose(apply(mixer, p, x), expected, rtol=1e-5, atol=1e-5)
    sparse, *_ = make(block_size=3, topk=1.0, mode="sparse_only")
    np.testing.assert_array_equal(apply(sparse, kernels, x), apply(mixer, p, x))


def test_the_linear_branch_is_silent_at_the_start():
    mixer, first, _ = make(block_size=3, topk=0.4)
    sparse, *_ = make(block_size=3, topk=0.4, mode="sparse_only")
    x = normal(B, T, D, seed=1)
    kernels = {name: first[name] for name in "qkvo"}
    np.testing.assert_array_equal(apply(mixer, first, x), apply(sparse, kernels, x))

    def loss(p):
        return jnp.sum(jnp.sin(mixer.apply({"params": p}, jnp.asarray(x), jnp.asarray(IDS))[0]))

    gradients = jax.jit(jax.grad(loss))(first)
    assert np.any(gradients["linear_out"]["kernel"])  # and it learns


def test_an_empty_remainder_has_finite_gradients():
    mixer, _, p = make(block_size=3, topk=0.4)
    # Row 1 begins and ends with documents of one token: their only block is chosen.
    x = jnp.asarray(30.0 * normal(B, T, D, seed=1), jnp.float32)
    params = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), p)

    def loss(p, x):
        return jnp.sum(jnp.sin(mixer.apply({"params": p}, x, jnp.asarray(IDS))[0]))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(params, x)):
        assert np.isfinite(leaf).all()


def test_the_share_of_blocks_is_rounded_down():
    q, k = (jnp.asarray(normal(1, 40, 1, 4, seed=s), jnp.float32) for s in (1, 2))
    for topk, wanted in ((0.3, 3), (0.29, 2), (0.05, 1), (1.0, 10)):
        choice = jax.jit(sparse_linear.choose_blocks, static_argnums=(2, 3, 4))(q, k, None, 4, topk)
        assert np.all(choice.chosen_BHTS.sum(-1) == 4 * wanted)
        assert np.all(choice.others_BT == (wanted < 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "mode is 'dense'; choose one of both, linear_only, sparse_only"),
        ({"topk": 0.0}, "topk above 0 and at most 1; got 64 and 0.0"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"feature_map": "elu"}, "'elu' takes both signs"),
        ({"grid": (3, 4)}, r"grid \(3, 4\) has 12 tokens, but a row has 14"),
    ],
)
def test_errors_name_what_was_given(options, message):
    mixer = mixers.make("sparse_linear", d_model=D, num_heads=H, **options)
    with pytest.raises(ValueError, match=f"sparse_linear: .*{message}"):
        mixer.init(jax.random.key(0), jnp.zeros((1, T, D)))
