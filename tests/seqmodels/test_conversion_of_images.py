"""Encoders and denoisers as teachers and students: what is inherited, and the distances of layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import models
from seqmodels.linearize import batches, inherit, layer_trees, objectives, students, transfer
from seqmodels.modules import pattern

GRID, E, D, L = (2, 3), 4, 8, 3
ENCODER = {
    "architecture": "encoder",
    "pattern": "full_attention(num_heads=2)",
    "num_layers": L,
    "d_model": D,
    "d_ff": 8,
    "num_classes": 5,
    "input_dim": E,
    "grid": GRID,
    "position_embedding": "per_token",
}
DENOISER = ENCODER | {"architecture": "denoiser", "objective": "noise", "learn_variance": True}
STUDENT = "bidirectional(mixer='linear_attention(num_heads=2)')"


@functools.cache
def made(architecture, text="full_attention(num_heads=2)", seed=0):
    """Returns a model and parameters drawn at random, those that begin at 0 too."""
    config = (ENCODER if architecture == "encoder" else DENOISER) | {"pattern": text}
    model = models.from_config(config)
    shapes = nn.unbox(batches.boxed_params(model))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.5, x.dtype)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def batch(seed=7):
    """Two packed documents of 6 tokens and padding."""
    rng = np.random.default_rng(seed)
    ids_BT = jnp.asarray([[1] * 6 + [2] * 6 + [0] * 2], jnp.int32)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "inputs": normal(1, 14, E),
        "noise": normal(1, 14, E),
        "time": jnp.asarray(rng.random((1, 14)), jnp.float32),
        "labels": ids_BT,
        "segment_ids": ids_BT,
    }


def converted(architecture, text, layers="all"):
    model, params = made(architecture)
    specs = students.student_specs(model, text, students.choose_layers(model.mixers, layers))
    config = ENCODER if architecture == "encoder" else DENOISER
    student = models.from_config(students.student_config(config, specs))
    return student, students.seed_params(jax.random.key(1), model, params, student)


@pytest.mark.parametrize("architecture", ["encoder", "denoiser"])
def test_a_student_that_keeps_softmax_is_the_teacher_exactly(architecture):
    for model, params in (made(architecture), converted(architecture, "full_attention")):
        found = model.apply({"params": params}, *batches.arguments(model, batch()))
        expected = found if model is made(architecture)[0] else expected
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("architecture", ["encoder", "denoiser"])
def test_all_but_attention(architecture):
    teacher = made(architecture)
    student = made(architecture, STUDENT, seed=1)
    found = inherit.inherit(teacher, student)
    theirs, own = inherit.paths(*teacher), inherit.paths(student[0], found.params)
    assert set(found.taken) == {path for path in theirs if "/mixer/" not in path}
    assert all(np.array_equal(own[path], theirs[path]) for path in found.taken)
    assert {path.split("/")[2] for path in found.new} == {"mixer"}


@pytest.mark.parametrize(
    "level, options",
    [
        ("mixer", ""),
        ("residual", ", mixer_residual=(0.0, 1.0)"),
        ("block", ", mixer_residual=(0.0, 1.0), channel_mixer=None"),
    ],
)
def test_levels_of_replacement(level, options):
    """The distance of each level is that of what the student's part replaces, and its gradient
    reaches that part alone."""
    text = f"bidirectional(mixer='linear_attention(num_heads=2)'{options})"
    student, own = converted("encoder", text, "1")
    model = transfer.make_model(made("encoder")[0], student)
    params = transfer.params(model, made("encoder"), (student, own))

    def total(params):
        loss_BT, _ = objectives.transfer_loss(model, params, batch(), {level: 1.0})
        return jnp.sum(loss_BT[:, :12])

    _, layers = layer_trees.split(model, jax.grad(total)(params))
    reached = {n: bool(np.any(x)) for n, x in inherit.partition.flatten(layers[1]).items()}
    own = {n for n in reached if n.startswith("student/mixer")}
    if level == "block" or level == "residual":
        assert all(reached[n] for n in own)
    assert not any(np.any(x) for x in jax.tree.leaves(layers[0]))


def test_an_encoders_distance_is_a_mean_over_each_document():
    student, own = converted("encoder", STUDENT)
    model = transfer.make_model(made("encoder")[0], student)
    params = transfer.params(model, made("encoder"), (student, own))
    plain = transfer.losses(model, params, batch())["mixer"][0]
    loss_BT, _ = objectives.transfer_loss(model, params, batch(), {"mixer": 2.0})
    expected = [np.mean(plain[:6])] * 6 + [np.mean(plain[6:12])] * 6
    np.testing.assert_allclose(loss_BT[0, :12], 2.0 * np.asarray(expected), rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_a_denoiser_predicts_and_its_hidden_states(scan_layers):
    model, params = made("denoiser")
    shared, layers = layer_trees.split(model, params)
    model = model.clone(scan_layers=scan_layers)
    params = layer_trees.join(model, shared, layers)
    found = objectives.denoised(model, params, batch(), features=True)
    out = model.apply({"params": params}, *batches.arguments(model, batch()))
    np.testing.assert_allclose(found.prediction_BTE, out[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.variance_BTE, out[1], rtol=1e-5, atol=1e-5)
    assert [h.shape for h in found.features] == [(1, 14, D)] * L
    # The first layers' states are those of a model that has no others.
    first = model.clone(mixers=model.mixers[:2])
    params = layer_trees.join(first, shared, layers[:2])
    shorter = objectives.denoised(first, params, batch(), features=True)
    for own, theirs in zip(shorter.features, found.features):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-5)


def test_options_of_whole_document_students():
    spec = pattern.parse("full_attention(num_heads=2, rope_base=100.0)")[0]
    assert students.inherited(spec, "full_attention", D) == dict(spec.options)
    assert students.inherited(spec, "delta_net", D) == {"num_heads": 2, "head_dim": 4}
    assert students.inherited(spec, "bidirectional", D) == {}
