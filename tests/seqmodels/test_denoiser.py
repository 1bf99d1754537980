"""Denoisers: identity at the start, conditions per document, DDIM on a known distribution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import denoiser, models
from seqmodels.modules import diffusion

E, D = 4, 16
BASE = {
    "architecture": "denoiser",
    "pattern": "linear_attention(num_heads=2)",
    "num_layers": 2,
    "d_model": D,
    "d_ff": 24,
    "num_classes": 3,
    "input_dim": E,
}
IDS = np.array([[1] * 3 + [2] * 5, [3] * 8], np.int32)
TIME = np.array([[0.2] * 3 + [0.7] * 5, [0.9] * 8], np.float32)
LABEL = np.array([[0] * 3 + [2] * 5, [-1] * 8], np.int32)
X = np.random.default_rng(0).standard_normal((2, 8, E)).astype(np.float32)


def make(**changes):
    model = models.from_config(BASE | changes)
    variables = jax.jit(model.init)(jax.random.key(0), X, TIME, LABEL, IDS)
    return model, nn.meta.unbox(variables)


def drawn(variables):
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), variables)


def test_at_the_start_blocks_are_the_identity_and_the_output_is_zero():
    model, variables = make()
    out_BTE, seen = model.apply(
        variables, X, TIME, LABEL, IDS, capture_intermediates=lambda m, name: name == "__call__"
    )
    assert out_BTE.dtype == jnp.float32 and not out_BTE.any()
    seen = seen["intermediates"]
    ((x_NBTD, _),) = seen["blocks"]["block_0"]["__call__"]
    np.testing.assert_array_equal(x_NBTD[-1], seen["embed"]["__call__"][0])
    assert jnp.abs(seen["blocks"]["block_0"]["mixer"]["__call__"][0][0]).max() > 0


def test_a_packed_document_has_its_own_time_and_class():
    model, variables = make()
    variables = drawn(variables)
    apply = jax.jit(model.apply)
    out_BTE = apply(variables, X, TIME, LABEL, IDS)
    alone_BTE = apply(variables, X[:1, 3:], TIME[:1, 3:4], LABEL[:1, 3:4])  # one for the row
    np.testing.assert_allclose(out_BTE[:1, 3:], alone_BTE, atol=1e-5)
    for time, label in ((0.3, 2), (0.7, 1), (0.7, -1)):
        pair = jnp.full((1, 1), time), jnp.full((1, 1), label)
        assert jnp.abs(apply(variables, X[:1, 3:], *pair) - alone_BTE).max() > 1e-3
    with pytest.raises(ValueError, match="pass label_BT, with -1 for no class"):
        model.apply(variables, X, TIME)
    with pytest.raises(ValueError, match=r"expected \(rows, tokens, 4\), with input_dim channels"):
        model.apply(variables, X[..., :3], TIME, LABEL)


def test_guidance_goes_on_from_no_class_to_the_class():
    """One step from time 1 gives x_0 = x - v, in which the guided v is linear in w."""
    model, variables = make(num_layers=1)
    variables = drawn(variables)

    def sample(label, guidance):
        label_B = jnp.full((2,), label)
        key, shape = jax.random.key(3), X.shape
        return denoiser.ddim_sample(
            model, variables, key, shape, label_B, steps=1, guidance=guidance
        )

    none, one, guided = sample(-1, 1.0), sample(1, 1.0), sample(1, 3.0)
    np.testing.assert_allclose(guided, none + 3.0 * (one - none), atol=1e-4)
    assert jnp.abs(one - none).max() > 1e-3


@pytest.mark.parametrize("process", [
    diffusion.Process("velocity"),
    diffusion.Process("noise", "linear"),
    diffusion.Process("noise", "cosine"),
])  # fmt: skip
def test_ddim_of_the_best_denoiser_of_a_gaussian_samples_that_gaussian(process):
    """x_0 ~ N(m, r^2): given x_t, E[x_0] = m + a r^2 (x_t - a m) / (a^2 r^2 + s^2)."""
    m, r = 1.5, 0.5

    def predict(x_BTE, time):
        a, s = process.levels(time)
        x0_BTE = m + a * r**2 * (x_BTE - a * m) / (a**2 * r**2 + s**2)
        # a is nearly 0 where the objective is noise: e without a difference divided by s.
        noise_BTE = s * (x_BTE - a * m) / (a**2 * r**2 + s**2)
        return noise_BTE - x0_BTE if process.objective == "velocity" else noise_BTE

    noise_BTE = jax.random.normal(jax.random.key(0), (50, 20, 4))
    samples = diffusion.ddim(process, predict, noise_BTE, steps=200)
    # The noise itself has these moments, up to the sample's.
    np.testing.assert_allclose(samples.mean(), m + r * noise_BTE.mean(), atol=0.01)
    np.testing.assert_allclose(samples.std(), r * noise_BTE.std(), rtol=0.02)
    # Without further noise the map from noise to data is monotone, here affine.
    np.testing.assert_allclose(samples, m + r * noise_BTE, atol=0.06)


def test_estimates_are_those_that_made_the_noised_data():
    noise_BTE = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    for process in (diffusion.Process("velocity"), diffusion.Process("noise", "cosine")):
        noised_BTE = process.noised(X, noise_BTE, TIME)
        found = process.split(noised_BTE, process.target(X, noise_BTE), TIME)
        np.testing.assert_allclose(found[0], X, atol=1e-5)
        np.testing.assert_allclose(found[1], noise_BTE, atol=1e-5)
    with pytest.raises(ValueError, match="steps is 1001; it must be at least 1, and at most 1000"):
        diffusion.Process("noise").sampling_times(1001)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_the_bound_is_the_divergence_of_two_gaussians(schedule):
    """Against the posterior by Bayes' rule, from the definition of the process, in float64."""
    n, x0, noise, share, guess = 400, 0.7, -0.4, 0.3, 0.1
    b, kept = diffusion.betas(schedule), diffusion.kept_power(schedule)
    xn = np.sqrt(kept[n]) * x0 + np.sqrt(1 - kept[n]) * noise
    # q(x_{n-1} | x_n, x_0) is q(x_n | x_{n-1}) q(x_{n-1} | x_0), normalised.
    precision = (1 - b[n]) / b[n] + 1 / (1 - kept[n - 1])

    def mean(x0):
        return (
            np.sqrt(1 - b[n]) * xn / b[n] + np.sqrt(kept[n - 1]) * x0 / (1 - kept[n - 1])
        ) / precision

    guessed = (xn - np.sqrt(1 - kept[n]) * guess) / np.sqrt(kept[n])
    u = (share + 1) / 2
    log_p = u * np.log(b[n]) - (1 - u) * np.log(precision)
    log_q = -np.log(precision)
    kl = 0.5 * (log_p - log_q + np.exp(log_q - log_p) - 1)
    kl += 0.5 * (mean(x0) - mean(guessed)) ** 2 * np.exp(-log_p)

    def bound(guess):
        arrays = (jnp.full((1, 1, 1), value, jnp.float32) for value in (x0, xn, guess, share))
        time_BT = np.full((1, 1), (n + 0.5) / diffusion.STEPS, np.float32)
        return diffusion.variational_bound(schedule, *arrays, time_BT)[0, 0]

    np.testing.assert_allclose(bound(guess), kl / np.log(2), rtol=2e-3)
    assert jax.grad(bound)(guess) == 0.0  # it trains the variance alone


def test_betas():
    linear, cosine = (diffusion.betas(name) for name in diffusion.SCHEDULES)
    assert (linear[0], linear[-1]) == (1e-4, 0.02) and cosine.max() == 0.999
    np.testing.assert_allclose(diffusion.kept_power("linear")[-1], 4.04e-5, rtol=0.01)
    # cos^2 of the schedule is what is kept.
    f = np.cos((np.array([0.5, 0.0]) + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(diffusion.kept_power("cosine")[499], f[0] / f[1], rtol=1e-6)


def test_a_denoiser_with_two_outputs():
    model, variables = make(objective="noise", learn_variance=True, num_layers=1)
    noise_BTE, share_BTE = jax.eval_shape(model.apply, variables, X, TIME, LABEL, IDS)
    assert noise_BTE.shape == share_BTE.shape == X.shape
    samples = jax.eval_shape(
        lambda: denoiser.ddim_sample(model, variables, jax.random.key(0), X.shape, steps=2)
    )
    assert samples.shape == X.shape
