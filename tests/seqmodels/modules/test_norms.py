"""Norms over batches: what they compute in training and in evaluation, and their options."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.modules import norms

IDS = np.array([[1, 1, 2, 0], [3, 3, 3, 3]], np.int32)
X = np.random.default_rng(0).normal(2.0, 3.0, (2, 4, 5)).astype(np.float32)
VALID = X[IDS > 0]


def train(norm, variables, x=X):
    y, seen = norm.apply(variables, x, IDS, mutable=[norms.STATISTICS])
    return y, variables | seen


def make(text):
    norm = norms.make(text, 1e-5)
    variables = nn.meta.unbox(norm.init(jax.random.key(0), X, IDS))
    keys = iter(jax.random.split(jax.random.key(1), 9))

    def drawn(leaf):
        return leaf + 0.3 * jax.random.normal(next(keys), leaf.shape)

    return norm, variables | {"params": jax.tree.map(drawn, variables["params"])}


def test_batch_norm_is_that_of_valid_tokens_and_evaluation_takes_running_averages():
    norm, variables = make("batch_norm(momentum=0.5)")
    y_BTD, after = train(norm, variables)
    scale, bias = (np.asarray(variables["params"][name]) for name in ("scale", "bias"))
    mean, var = VALID.mean(axis=0), VALID.var(axis=0)
    expected = (VALID - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(y_BTD[IDS > 0], expected, atol=1e-5)
    seen = jax.tree.map(np.asarray, after[norms.STATISTICS])
    np.testing.assert_allclose(seen["mean"], 0.5 * mean, rtol=1e-5)
    np.testing.assert_allclose(seen["var"], 0.5 + 0.5 * var, rtol=1e-5)
    # Padding has no part in it, and evaluation reads what was kept, token by token.
    other = np.where((IDS > 0)[..., None], X, 100.0)
    np.testing.assert_allclose(
        train(norm, variables, other)[1][norms.STATISTICS]["mean"], seen["mean"]
    )
    alone = norm.apply(after, X[:, :1])
    expected = (X[:, :1] - seen["mean"]) / np.sqrt(seen["var"] + 1e-5) * scale + bias
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    whole = train(norm, variables)[0]
    np.testing.assert_array_equal(
        whole, norm.apply(variables, X, IDS, mutable=[norms.STATISTICS])[0]
    )
    every = norm.apply(variables, X, mutable=[norms.STATISTICS])[1][norms.STATISTICS]
    np.testing.assert_allclose(every["mean"], 0.5 * X.mean(axis=(0, 1)), rtol=1e-5)


def test_prepbn_goes_from_layer_norm_to_rep_bn():
    """lambda is 1, 1 (warm-up), then 1, 2/3, 1/3, 0: exact at the ends, and linear between."""
    norm, variables = make("prepbn(steps=3, warmup=2)")
    own = variables["params"]
    layer = norms.make("layer_norm", 1e-5).apply({"params": own["layer"]}, X)
    rep_norm = norms.make("rep_bn", 1e-5)
    for step, share in enumerate((1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0, 0.0)):
        rep_variables = {"params": own["rep"], norms.STATISTICS: variables[norms.STATISTICS]["rep"]}
        rep, _ = train(rep_norm, rep_variables)
        in_evaluation = norm.apply(variables, X, IDS)
        np.testing.assert_array_equal(in_evaluation, rep_norm.apply(rep_variables, X, IDS))
        y_BTD, variables = train(norm, variables)
        np.testing.assert_allclose(y_BTD, share * layer + (1 - share) * rep, atol=1e-5)
        assert variables[norms.STATISTICS]["count"] == step + 1
    # RepBN is BatchNorm plus alpha x.
    batch, _ = train(norms.make("batch_norm", 1e-5), {"params": own["rep"]["norm"]} | {
        norms.STATISTICS: rep_variables[norms.STATISTICS]["norm"]})  # fmt: skip
    np.testing.assert_allclose(rep, batch + own["rep"]["alpha"] * X, atol=1e-5)


def test_alpha_starts_at_one_and_the_statistics_at_those_of_a_standard_normal():
    variables = nn.meta.unbox(norms.make("prepbn", 1e-5).init(jax.random.key(0), X, IDS))
    assert variables["params"]["rep"]["alpha"] == 1.0
    seen = variables[norms.STATISTICS]
    assert seen["count"] == 0 and not seen["rep"]["norm"]["mean"].any()
    assert (seen["rep"]["norm"]["var"] == 1.0).all()


@pytest.mark.parametrize("text", ["batch_norm", "rep_bn", "prepbn(steps=2)"])
def test_gradients_and_bfloat16(text):
    norm, variables = make(text)
    _, variables = train(norm, variables)  # lambda is 1/2

    def loss(params, x):
        y_BTD, _ = train(norm, variables | {"params": params}, x)
        return jnp.sum(jnp.square(y_BTD.astype(jnp.float32))[IDS > 0] * VALID)

    grads = jax.grad(loss, (0, 1))(variables["params"], X)
    assert all(jnp.isfinite(g).all() and jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads[0]))
    assert not grads[1][0, 3].any()  # padding
    narrow = train(norm, variables, X.astype(jnp.bfloat16))
    assert narrow[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(narrow[1])} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    np.testing.assert_allclose(narrow[0].astype(jnp.float32), train(norm, variables)[0], atol=0.15)


def test_texts_with_options():
    plain = norms.make("layer_norm(use_scale=False, use_bias=False)", 1e-5)
    assert "params" not in plain.init(jax.random.key(0), X)
    normed = plain.apply({}, X)
    np.testing.assert_allclose(normed.mean(axis=-1), 0.0, atol=1e-6)
    for text, message in (
        ("rmsnorm", "norm is 'rmsnorm'; choose one of rms_norm, .*prepbn"),
        ("prepbn(3)", "cannot read"),
        ("layer_norm(steps=3)", "'layer_norm' has no option 'steps'; it has use_bias, use_scale"),
        ("batch_norm(momentum='high')", "momentum of norm batch_norm is 'high'; expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            norms.make(text, 1e-5)
    with pytest.raises(ValueError, match="steps is 0 and warmup 0; they must be at least 1 and 0"):
        norms.make("prepbn(steps=0)", 1e-5).init(jax.random.key(0), X)
