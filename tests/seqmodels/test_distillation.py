"""Losses of denoisers' and ensembles' distillation, against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.linearize import ensembles, objectives

B, T, E, W = 2, 3, 4, 5


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def denoised(seed, layers=2):
    features = [normal(B, T, 6, seed=seed + 2 + i) for i in range(layers)]
    return objectives.Denoised(normal(B, T, E, seed=seed), normal(B, T, E, seed=seed + 1), features)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"noise": 0.0, "variance": 0.0},
        {"noise": 0.5, "variance": 0.0},
        {"noise": 0.0, "variance": 0.05},
        {"noise": 0.5, "variance": 0.0, "features": 0.5},
    ],
)
def test_denoising_distillation(weights):
    loss_BT, student, teacher = normal(B, T, seed=9), denoised(10), denoised(20)
    found_BT, metrics = objectives.denoising_distillation(loss_BT, student, teacher, **weights)
    weights = {"noise": 0.5, "variance": 0.05, "features": 0.0} | weights
    expected_BT = np.asarray(loss_BT, np.float64)
    pairs = [(weights["noise"], *(x.prediction_BTE for x in (student, teacher)))]
    pairs += [(weights["variance"], *(x.variance_BTE for x in (student, teacher)))]
    pairs += [(weights["features"], *h) for h in zip(student.features, teacher.features)]
    for weight, own, theirs in pairs:
        gap = np.asarray(own, np.float64) - np.asarray(theirs, np.float64)
        expected_BT = expected_BT + weight * np.mean(gap**2, axis=-1)
    np.testing.assert_allclose(found_BT, expected_BT, rtol=1e-5)
    assert set(metrics) == {f"{name}_distance" for name, weight in weights.items() if weight}


def test_no_gradient_reaches_the_teacher():
    def total(student, teacher):
        zero_BT = jnp.zeros((B, T))
        return jnp.sum(
            objectives.denoising_distillation(zero_BT, student, teacher, features=1.0)[0]
        )

    own, theirs = jax.grad(total, (0, 1))(denoised(10), denoised(20))
    assert all(np.all(x) for x in jax.tree.leaves(own))
    assert not any(np.any(x) for x in jax.tree.leaves(theirs))


def test_denoisers_that_do_not_fit():
    loss_BT, student = jnp.zeros((B, T)), denoised(10)
    plain = student._replace(variance_BTE=None)
    with pytest.raises(ValueError, match="variance is 0.05, and the student or the teacher"):
        objectives.denoising_distillation(loss_BT, student, plain)
    with pytest.raises(ValueError, match="features is 0.5, and the hidden states"):
        objectives.denoising_distillation(loss_BT, student, denoised(20, 3), features=0.5)


def softmax(x):
    x = np.exp(np.asarray(x, np.float64))
    return x / x.sum(axis=-1, keepdims=True)


def test_a_students_loss_is_that_of_the_sum():
    f, F, teacher = (2.0 * normal(B, T, W, seed=i) for i in range(3))
    labels_BT = jnp.asarray([[0, 1, 2], [3, 4, 0]])
    options = {"kl": 0.7, "temperature": 2.0, "boost": 3.0}
    loss_BT, metrics = ensembles.loss(f, F, teacher, labels_BT, **options)
    total = np.asarray(f, np.float64) + np.asarray(F, np.float64)
    ce_BT = -np.log(np.take_along_axis(softmax(total), np.asarray(labels_BT)[..., None], -1))[
        ..., 0
    ]
    p, q = softmax(np.asarray(teacher, np.float64) / 2.0), softmax(total / 2.0)
    kl_BT = np.sum(p * np.log(p / q), axis=-1)
    weight_BT = 1.0 + 3.0 * 0.5 * np.abs(softmax(F) - softmax(teacher)).sum(axis=-1)
    np.testing.assert_allclose(metrics["weight"], weight_BT, rtol=1e-5)
    np.testing.assert_allclose(loss_BT, weight_BT * (ce_BT + 0.7 * 4.0 * kl_BT), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], total.argmax(axis=-1) == labels_BT)


def test_tokens_count_more_where_the_ensemble_disagrees():
    sure = 30.0 * jax.nn.one_hot(jnp.asarray([[0, 1]]), W)
    other = 30.0 * jax.nn.one_hot(jnp.asarray([[0, 2]]), W)
    np.testing.assert_allclose(ensembles.disagreement(sure, other), [[0.0, 1.0]], atol=1e-6)
    labels_BT = jnp.asarray([[0, 1]])
    _, metrics = ensembles.loss(sure, other, sure, labels_BT, boost=2.0)
    np.testing.assert_allclose(metrics["weight"], [[1.0, 3.0]], rtol=1e-6)
    _, first = ensembles.loss(sure, None, sure, labels_BT, boost=2.0)
    np.testing.assert_array_equal(first["weight"], [[1.0, 1.0]])
    np.testing.assert_allclose(first["kl"], 0.0, atol=1e-6)
