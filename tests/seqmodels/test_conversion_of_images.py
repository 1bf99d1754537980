"""Encoders and denoisers as teachers and students: inheritance, and distances of layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers, models
from seqmodels.linearize import batches, inherit, layer_trees, objectives, students, transfer
from seqmodels.modules import blocks, pattern

GRID, E, D, L = (2, 3), 4, 8, 3
SOFTMAX = "full_attention(num_heads=2)"
LEVELS = {
    "mixer": "",
    "residual": ", mixer_residual=(0.0, 1.0)",
    "block": ", mixer_residual=(0.0, 1.0), channel_mixer=None",
}
ENCODER = {
    "architecture": "encoder",
    "pattern": SOFTMAX,
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
def made(architecture, text=SOFTMAX, seed=0):
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
    expected, found = (
        jax.jit(lambda p, m=model: m.apply({"params": p}, *batches.arguments(m, batch())))(params)
        for model, params in (made(architecture), converted(architecture, "full_attention"))
    )
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


@pytest.mark.parametrize("level, options", LEVELS.items())
def test_levels_of_replacement(level, options):
    """The distance of each level from the two layers run by themselves, up to that level."""
    text = f"full_attention(num_heads=1{options})"
    specs = {name: pattern.parse(t)[0] for name, t in (("teacher", SOFTMAX), ("student", text))}
    shared = {"d_model": D, "d_ff": 8}
    layer = mixers.Layer(0, 1)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((1, 14, D)), jnp.float32)
    arguments = x_BTD, batch()["segment_ids"], None, None, layer
    pair = transfer.PairBlock(transfer.Pair(**specs), **shared)
    params = nn.unbox(jax.jit(pair.init)(jax.random.key(0), *arguments))["params"]
    run = jax.jit(lambda p: pair.apply({"params": p}, *arguments, mutable=["intermediates"]))
    (out_BTD, _), sown = run(params)

    def alone(name, **changed):
        block = blocks.Block(specs[name], **shared, **changed)
        return jax.jit(lambda p: block.apply({"params": p}, *arguments)[0])(params[name])

    np.testing.assert_allclose(out_BTD, alone("teacher"), rtol=1e-5)
    cut = {} if level == "block" else {"channel_mixer": None}
    gap_BTD = alone("teacher", **cut) - alone("student", **cut)
    found = sown["intermediates"]["residual" if level == "mixer" else level][0]
    np.testing.assert_allclose(found, jnp.mean(gap_BTD**2, axis=-1), rtol=1e-4)
    if level == "mixer":  # where the residual cancels
        np.testing.assert_allclose(sown["intermediates"]["mixer"][0], found, rtol=1e-4)


def test_an_encoders_distance_is_a_mean_over_each_document():
    student, own = converted("encoder", STUDENT)
    model = transfer.make_model(made("encoder")[0], student)
    params = transfer.params(model, made("encoder"), (student, own))
    plain = jax.jit(lambda p: transfer.losses(model, p, batch()))(params)["mixer"][0]
    loss_BT, _ = jax.jit(lambda p: objectives.transfer_loss(model, p, batch(), {"mixer": 2.0}))(
        params
    )
    expected = [np.mean(plain[:6])] * 6 + [np.mean(plain[6:12])] * 6
    np.testing.assert_allclose(loss_BT[0, :12], 2.0 * np.asarray(expected), rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_a_denoiser_predicts_and_its_hidden_states(scan_layers):
    model, params = made("denoiser")
    shared, layers = layer_trees.split(model, params)
    model = model.clone(scan_layers=scan_layers)
    params = layer_trees.join(model, shared, layers)

    def denoised(model, params):
        return jax.jit(lambda p: objectives.denoised(model, p, batch(), features=True))(params)

    found = denoised(model, params)
    out = jax.jit(lambda p: model.apply({"params": p}, *batches.arguments(model, batch())))(params)
    np.testing.assert_allclose(found.prediction_BTE, out[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.variance_BTE, out[1], rtol=1e-5, atol=1e-5)
    assert [h.shape for h in found.features] == [(1, 14, D)] * L
    # The first layers' states are those of a model that has no others.
    first = model.clone(mixers=model.mixers[:2])
    shorter = denoised(first, layer_trees.join(first, shared, layers[:2]))
    assert len(shorter.features) == 2
    for own, theirs in zip(shorter.features, found.features):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-5)


def test_options_of_whole_document_students():
    spec = pattern.parse("full_attention(num_heads=2, rope_base=100.0)")[0]
    assert students.inherited(spec, "full_attention", D) == dict(spec.options)
    assert students.inherited(spec, "delta_net", D) == {"num_heads": 2, "head_dim": 4}
    assert students.inherited(spec, "bidirectional", D) == {}
