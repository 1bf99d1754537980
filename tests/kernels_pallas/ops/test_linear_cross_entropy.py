"""linear_cross_entropy and linear_kl_divergence: against float64, in little memory, and mistakes
explained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_cross_entropy, linear_kl_divergence
from kernels_pallas.ops.linear_cross_entropy import chunked
from kernels_pallas.ops.linear_cross_entropy.shapes import SHAPES
from tests.kernels_pallas.ops.conformance import TOLERANCE, assert_close

B, T, D, E, W = 2, 37, 12, 10, 50


def _inputs(rng, scale=1.0):
    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    return {"x": normal(B, T, D) * scale, "matrix": normal(W, D), "bias_W": normal(W)}


def _given(rng, form):
    mask_BT = (rng.random((B, T)) < 0.8).astype(np.float32)
    if form == "labels":
        labels_BT = np.where(
            mask_BT == 0, -1, rng.integers(0, W, (B, T))
        )  # what a mask hides may be anything
        return {"labels_BT": labels_BT.astype(np.int32), "mask_BT": mask_BT}
    if form == "teacher logits":
        logits = 3 * rng.standard_normal((B, T, W))
        logits[:, :, ::7] = -np.inf
        return {"teacher_BTE": logits.astype(np.float32), "mask_BT": mask_BT}
    return {
        "teacher_BTE": rng.standard_normal((B, T, E)).astype(np.float32),
        "teacher_matrix": rng.standard_normal((W, E)).astype(np.float32),
        "teacher_bias_W": rng.standard_normal(W).astype(np.float32),
        "mask_BT": mask_BT,
    }


@functools.partial(jax.jit, static_argnames=("options", "form"))
def _losses_and_gradients(inputs, given, g_BT, *, form, options):
    operator = linear_cross_entropy if form == "labels" else linear_kl_divergence

    def losses(inputs):
        inputs = dict(inputs)
        return operator(inputs.pop("x"), inputs.pop("matrix"), **inputs, **given, **dict(options))

    loss_BT, vjp = jax.vjp(losses, inputs)
    (gradients,) = vjp(g_BT.astype(loss_BT.dtype))
    return {"loss": loss_BT, **{f"gradient of {name}": g for name, g in gradients.items()}}


def _truth(inputs, given, g_BT, form, options):
    def wide(x):
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        inputs, given, g_BT = jax.tree.map(wide, (inputs, given, g_BT))
        options = (*(o for o in options if o[0] != "chunk_size"), ("implementation", "reference"))
        found = _losses_and_gradients(inputs, given, g_BT, form=form, options=options)
        return jax.tree.map(np.asarray, found)


OPTIONS = {
    "plain": (),
    "capped, z": (("logit_softcap", 5.0), ("z_loss", 1e-2)),
    "hot": (("temperature", 2.0), ("logit_softcap", 5.0), ("teacher_logit_softcap", 4.0)),
}
CASES = [
    ("labels", "plain"),
    ("labels", "capped, z"),
    ("teacher", "plain"),
    ("teacher", "hot"),
    ("teacher logits", "plain"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form, options", CASES)
def test_losses_and_gradients(form, options, dtype):
    """Pieces of 16, 16 and 5 tokens."""
    rng = np.random.default_rng(0)
    inputs, given = _inputs(rng), _given(rng, form)
    g_BT = rng.standard_normal((B, T)).astype(np.float32)
    inputs = {k: v if k == "bias_W" else v.astype(jnp.dtype(dtype)) for k, v in inputs.items()}
    expected = _truth(inputs, given, g_BT, form, OPTIONS[options])
    hidden = given["mask_BT"] == 0
    for implementation in ("chunked", "reference"):
        chosen = (("implementation", implementation), ("chunk_size", 16))
        got = _losses_and_gradients(
            inputs, given, g_BT, form=form, options=OPTIONS[options] + chosen
        )
        assert_close(got, expected, TOLERANCE[dtype])
        assert (np.asarray(got["loss"])[hidden] == 0).all()
        assert (np.asarray(got["gradient of x"])[hidden] == 0).all()


@pytest.mark.parametrize("chunk_size", [1, 37, 64, None])
def test_any_piece_and_layout(chunk_size):
    rng = np.random.default_rng(1)
    inputs, given = _inputs(rng, scale=30.0), _given(rng, "labels")  # logits of several hundred
    g_BT = np.ones((B, T), np.float32)
    expected = _truth(inputs, given, g_BT, "labels", ())
    options = (("chunk_size", chunk_size),)
    assert_close(
        _losses_and_gradients(inputs, given, g_BT, form="labels", options=options),
        expected,
        TOLERANCE["float32"],
    )
    turned = inputs | {"matrix": inputs["matrix"].T}
    options = (*options, ("layout", "DW"))
    got = dict(_losses_and_gradients(turned, given, g_BT, form="labels", options=options))
    got["gradient of matrix"] = got["gradient of matrix"].T
    assert_close(got, expected, TOLERANCE["float32"])


def test_loss_is_that_of_its_definition():
    """In numpy, against no implementation."""
    rng = np.random.default_rng(2)
    inputs, given = _inputs(rng), _given(rng, "labels")
    logits = inputs["x"].astype(np.float64) @ inputs["matrix"].T + inputs["bias_W"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.maximum(given["labels_BT"], 0)[..., None], -1))
    got = linear_cross_entropy(
        inputs["x"], inputs["matrix"], given["labels_BT"], bias_W=inputs["bias_W"]
    )
    seen = given["mask_BT"] != 0
    np.testing.assert_allclose(got[seen], expected[..., 0][seen], rtol=1e-5)
    teacher = rng.standard_normal((B, T, W)).astype(np.float32)
    t = np.exp(teacher.astype(np.float64))
    t /= t.sum(-1, keepdims=True)
    kl = linear_kl_divergence(inputs["x"], inputs["matrix"], teacher, bias_W=inputs["bias_W"])
    np.testing.assert_allclose(kl, (t * np.log(t / p)).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_details_are_those_of_the_logits(implementation):
    rng = np.random.default_rng(3)
    inputs, given = _inputs(rng), _given(rng, "labels")
    logits = 5 * np.tanh((inputs["x"] @ inputs["matrix"].T) / 5)
    log_z = np.log(np.exp(logits).sum(-1))
    labels = rng.integers(0, W, (B, T))
    labels[0] = logits[0].argmax(-1)
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]

    def total(x):
        loss_BT, details = linear_cross_entropy(
            x, inputs["matrix"], labels, logit_softcap=5.0, z_loss=0.1, details=True,
            mask_BT=given["mask_BT"], chunk_size=16, implementation=implementation,
        )  # fmt: skip
        return loss_BT.sum() + sum(z.sum() for z in details), (loss_BT, details)

    gradient, (loss_BT, details) = jax.grad(total, has_aux=True)(inputs["x"])
    np.testing.assert_allclose(details.nll_BT, log_z - chosen, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(details.log_z_BT, log_z, rtol=1e-5)
    np.testing.assert_array_equal(details.correct_BT, logits.argmax(-1) == labels)
    seen = given["mask_BT"] != 0
    np.testing.assert_allclose(
        loss_BT[seen], (details.nll_BT + 0.1 * details.log_z_BT**2)[seen], rtol=1e-6
    )
    assert (np.asarray(gradient)[~seen] == 0).all(), (
        "details have no gradient, and hidden tokens none"
    )
    assert (np.asarray(gradient)[seen] != 0).any()


def test_words_that_the_dtype_of_targets_does_not_reach():
    """A byte counts to 255: word 256 is not word 0."""
    rng = np.random.default_rng(0)
    x, matrix = (rng.standard_normal(n).astype(np.float32) for n in ((1, 4, 3), (259, 3)))
    labels = np.array([[0, 1, 2, 255]])
    got, expected = (
        linear_cross_entropy(x, matrix, labels.astype(dtype)) for dtype in (np.uint8, np.int32)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("form", ["labels", "teacher"])
def test_memory_does_not_grow_with_the_logits(form):
    """Forward and backward, as compiled: eight times the tokens take no more than what x and its
    gradient grow by."""

    def temporary(T, W, chunk_size):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        x, matrix = shape((2, T, 32)), shape((W, 32))
        if form == "labels":
            given = {"labels_BT": jax.ShapeDtypeStruct((2, T), jnp.int32)}
        else:
            given = {"teacher_BTE": shape((2, T, 16)), "teacher_matrix": shape((W, 16))}
        run = _losses_and_gradients.lower(
            {"x": x, "matrix": matrix},
            given,
            shape((2, T)),
            form=form,
            options=(("chunk_size", chunk_size),),
        )
        return run.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(256, 4096, 64), temporary(2048, 4096, 64)
    x_bytes = 4 * 2 * 2048 * 32
    assert many - few <= 2 * x_bytes
    assert many < 4 * 2 * 2048 * 4096 / 4, "less than a quarter of the logits"
    # and the pieces are what it takes: smaller ones take less
    assert temporary(2048, 4096, 16) < many


def test_pieces_that_nobody_chose():
    for shape in SHAPES.values():
        c = chunked.heuristic_chunk_size(shape["B"], shape["T"], shape["W"])
        low, high = chunked.TOKENS_OF_A_PIECE
        assert c * shape["B"] <= high + shape["B"]
        assert c * shape["B"] >= min(low, shape["B"] * shape["T"]) / 2
    assert chunked.heuristic_chunk_size(1, 1, 1 << 20) == 1
    assert chunked.heuristic_chunk_size(4096, 3, 100) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": "TD"}, "unknown layout 'TD'; choose one of WD, DW"),
        ({"layout": "DW"}, r"matrix must be \(D, W\) with x's D = 12; got \(50, 12\)"),
        ({"labels_BT": jnp.zeros((B, T))}, "labels_BT has dtype float32; expected integers"),
        ({"labels_BT": jnp.zeros((B, 1), int)}, r"labels_BT has shape \(2, 1\); expected"),
        ({"bias_W": jnp.zeros(3)}, r"bias_W has shape \(3,\); expected \(50,\)"),
        ({"mask_BT": jnp.zeros((B,))}, r"mask_BT has shape \(2,\)"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0; expected a positive number"),
        ({"chunk_size": 0}, "chunk_size is 0; expected a positive integer"),
        ({"implementation": "fast"}, "choose one of 'chunked', 'reference'"),
    ],
)
def test_errors_name_what_was_given(change, message):
    arguments = {"x_BTD": jnp.zeros((B, T, D)), "matrix": jnp.zeros((W, D))}
    arguments |= {"labels_BT": jnp.zeros((B, T), int)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"teacher_matrix": None},
            r"\(its logits\) has shape \(2, 37, 10\); expected \(2, 37, 50\)",
        ),
        ({"teacher_matrix": jnp.zeros((W + 1, E))}, "must share batch, time and vocabulary"),
        ({"teacher_matrix": None, "teacher_bias_W": jnp.zeros(W)}, "without teacher_matrix"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
    ],
)
def test_errors_about_the_teacher(change, message):
    arguments = {"x_BTD": jnp.zeros((B, T, D)), "matrix": jnp.zeros((W, D))}
    arguments |= {"teacher_BTE": jnp.zeros((B, T, E)), "teacher_matrix": jnp.zeros((W, E))} | change
    with pytest.raises(ValueError, match=message):
        linear_kl_divergence(**arguments)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_masked_token_may_be_anything(implementation, value):
    """Losses and gradients are those of finite tokens, of the teacher too; details tell what is
    there."""
    rng, (B, T, D, W) = np.random.default_rng(0), (2, 5, 3, 7)
    x, teacher = rng.standard_normal((2, B, T, D)).astype(np.float32)
    matrix = rng.standard_normal((W, D)).astype(np.float32)
    mask = rng.random((B, T)) < 0.6
    labels = rng.integers(0, W, (B, T))
    bad_x, bad_teacher = (np.where(mask[..., None], z, np.float32(value)) for z in (x, teacher))

    def losses(x, matrix, teacher):
        arguments = {"mask_BT": mask, "chunk_size": 2, "implementation": implementation}
        cross = linear_cross_entropy(x, matrix, labels, z_loss=0.1, **arguments)
        return cross, linear_kl_divergence(x, matrix, teacher, matrix, **arguments)

    def total(x, matrix, teacher):
        return sum(jnp.sum(loss) for loss in losses(x, matrix, teacher))

    for function in (losses, jax.grad(total, argnums=(0, 1))):
        got, expected = function(bad_x, matrix, bad_teacher), function(x, matrix, teacher)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    _, details = linear_cross_entropy(
        bad_x, matrix, labels, mask_BT=mask, details=True, implementation=implementation
    )
    assert not np.isfinite(np.asarray(details.nll_BT)[~mask]).any()


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_the_weight_of_the_z_loss_has_a_gradient(implementation):
    """Of an array without axes: the sum of the loss's cotangent times (log Z)^2, where the mask
    lets it.
    """
    rng = np.random.default_rng(0)
    inputs, given = _inputs(rng), _given(rng, "labels")
    g_BT = rng.standard_normal((B, T)).astype(np.float32)

    def loss(z_loss, matrix):
        loss_BT, details = linear_cross_entropy(
            inputs["x"], matrix, **given, z_loss=z_loss, chunk_size=8, details=True,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(g_BT * loss_BT), details.log_z_BT

    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, log_z_BT), d_z = jax.jit(gradient)(jnp.float32(0.2), inputs["matrix"])
    expected = np.sum(g_BT * (given["mask_BT"] != 0) * np.square(log_z_BT))
    np.testing.assert_allclose(d_z, expected, rtol=1e-4)
    # and its own gradient: that of the matrix's by the weight
    by_matrix = jax.jit(jax.grad(loss, 1, has_aux=True))
    both = jax.jit(jax.grad(lambda matrix: gradient(jnp.float32(0.2), matrix)[1]))
    slope = by_matrix(1.2, inputs["matrix"])[0] - by_matrix(0.2, inputs["matrix"])[0]
    assert_close({"both": both(inputs["matrix"])}, {"both": slope}, TOLERANCE["float32"])
