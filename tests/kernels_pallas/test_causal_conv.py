"""causal_conv: the conformance suite, and the tails that only a convolution has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import causal_conv
from kernels_pallas.causal_conv import step
from kernels_pallas.causal_conv.shapes import SHAPES
from tests.kernels_pallas.conformance import OperatorCase, Shape, Suite, inputs_of


def _inputs(rng, shape: Shape, regime: str):
    width, D = int(regime.split()[1]), shape.K
    inputs = {
        "x": rng.standard_normal((shape.B, shape.T, D)),
        "w": rng.standard_normal(
            width * D
        ),  # flat: to the suite, arrays of rank 2 and more have a batch axis
        "initial_state": rng.standard_normal((shape.B, width - 1, D)),
    }
    if "bias" in regime:
        inputs["bias"] = rng.standard_normal(D)
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def _call(inputs, options=(), **keywords):
    inputs = dict(inputs)
    x = inputs.pop("x")
    w = inputs.pop("w").reshape(-1, x.shape[-1])
    return causal_conv(x, w, **inputs, **dict(options), **keywords)


def _step(token, state, options=()):
    x = token["x"]
    w = token["w"].reshape(-1, x.shape[-1])
    return step(x, w, state, bias=token.get("bias"), **dict(options))


CASE = OperatorCase(
    name="causal_conv",
    implementations=("shifted", "pallas_tpu"),
    make_inputs=_inputs,
    call=_call,
    step=_step,
    regimes=("width 2", "width 4 bias", "width 16"),
    typical=("width 4 bias",),
    fast=((1, "width 4 bias"), (100, "width 4 bias"), (64, "width 16")),
    # All widths at one length with more than one chunk, and the usual width at the others.
    kernels_skip=lambda T, regime: regime != "width 4 bias" and T != 1000,
    rounded=("x", "w", "bias", "initial_state"),
    grouped=False,
)


class TestCausalConv(Suite):
    case = CASE

    def test_causality_by_gradient(self, implementation, typical):
        """The output at t takes a gradient from its last `width` tokens and from no other."""
        inputs = inputs_of(self.case, Shape(B=1, T=40), typical)

        @jax.jit
        def seen_from(t):
            def output(x):
                return _call({**inputs, "x": x}, implementation=implementation)[0][0, t].sum()

            return jnp.abs(jax.grad(output)(inputs["x"])).max(axis=(0, 2)) > 0

        age_TT = np.arange(40)[:, None] - np.arange(40)[None]
        np.testing.assert_array_equal(
            jax.vmap(seen_from)(jnp.arange(40)), (age_TT >= 0) & (age_TT < 4)
        )


def test_against_numpy_convolution():
    """The definition from outside: w[-1] is on the current token."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((50, 3)), rng.standard_normal((4, 3))
    expected = np.stack([np.convolve(x[:, d], w[::-1, d])[:50] for d in range(3)], axis=1)
    y, tail = causal_conv(jnp.asarray(x, jnp.float32)[None], jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    np.testing.assert_array_equal(tail[0], x[-3:].astype(np.float32))


def test_width_one_is_a_scale_with_an_empty_tail():
    x = jnp.arange(6.0).reshape(1, 3, 2)
    y, tail = causal_conv(x, jnp.array([[2.0, -1.0]]), bias=jnp.ones(2))
    np.testing.assert_array_equal(y, x * jnp.array([2.0, -1.0])[None, None] + 1)
    assert tail.shape == (1, 0, 2)
    y, tail = step(x[:, 0], jnp.array([[2.0, -1.0]]), tail)
    assert tail.shape == (1, 0, 2)


@pytest.mark.parametrize("implementation", ["shifted", "reference"])
def test_tail_of_few_tokens_holds_the_older_taps(implementation):
    entering = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    x = jnp.array([10.0, 20.0]).reshape(1, 2, 1)
    w = jnp.ones((6, 1))
    _, tail = causal_conv(x, w, initial_state=entering, implementation=implementation)
    np.testing.assert_array_equal(tail[0, :, 0], [3, 4, 5, 10, 20])


@pytest.mark.parametrize("implementation", ["shifted", "reference"])
@pytest.mark.parametrize(
    "ids, expected",
    [
        ([5, 5, 5, 5], [20, 30, 40]),  # one document: the entering tail was its own
        ([5, 5, 5, 6], [0, 0, 40]),
        ([5, 6, 6, 6], [20, 30, 40]),
        ([5, 6, 5, 5], [0, 30, 40]),  # an id that comes back is another document
        ([5, 5], [3, 10, 20]),
        ([5, 6], [0, 0, 20]),
    ],
)
def test_tail_holds_the_last_document_only(implementation, ids, expected):
    x = 10 * jnp.arange(1.0, len(ids) + 1).reshape(1, -1, 1)
    _, tail = jax.jit(causal_conv, static_argnames="implementation")(
        x,
        jnp.ones((4, 1)),
        initial_state=jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1),
        segment_ids=jnp.array([ids]),
        implementation=implementation,
    )
    np.testing.assert_array_equal(tail[0, :, 0], expected)


def test_cut_inside_a_document_of_a_packed_row():
    """The second piece continues exactly the document it begins in, wherever the cut falls."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 12, 2)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((4, 2)), jnp.float32)
    ids = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4]])
    conv = jax.jit(causal_conv)
    whole, last = conv(x, w, segment_ids=ids)
    for cut in (1, 4, 6, 10):
        _, tail = conv(x[:, :cut], w, segment_ids=ids[:, :cut])
        if ids[0, cut] != ids[0, cut - 1]:  # whoever cuts between documents starts without a tail
            tail = None
        y, final = conv(x[:, cut:], w, initial_state=tail, segment_ids=ids[:, cut:])
        np.testing.assert_allclose(y, whole[:, cut:], atol=1e-6)
        np.testing.assert_array_equal(final, last)


def test_output_and_tail_keep_the_dtype_of_x():
    x = jnp.ones((1, 3, 2), jnp.bfloat16)
    y, tail = causal_conv(x, jnp.ones((4, 2)), initial_state=jnp.zeros((1, 3, 2)))
    assert (y.dtype, tail.dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_BTD": jnp.zeros((5, 3))}, r"x must be \(B, T, D\) with T > 0; got \(5, 3\)"),
        ({"x_BTD": jnp.zeros((2, 5, 3), int)}, "x must be floating or complex; got int"),
        ({"w": jnp.zeros((3, 4))}, r"w must be \(width, D\) .* D = 3; got \(3, 4\)"),
        ({"w": jnp.zeros((0, 3))}, r"width > 0"),
        ({"bias": jnp.zeros(4)}, r"bias has shape \(4,\); expected \(3,\)"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"\(2, 4, 3\); expected \(2, 3, 3\)"),
        ({"segment_ids": jnp.zeros((2, 4))}, r"segment_ids has shape \(2, 4\); expected \(2, 5\)"),
        ({"implementation": "fft"}, "'shifted', 'reference'"),
    ],
)
def test_errors_name_what_was_given(change, message):
    arguments = {"x_BTD": jnp.zeros((2, 5, 3)), "w": jnp.zeros((4, 3)), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments)


def test_published_workloads_trace():
    for shape in SHAPES.values():
        x = jax.ShapeDtypeStruct((shape["B"], shape["T"], shape["D"]), jnp.bfloat16)
        w = jax.ShapeDtypeStruct((shape["I"], shape["D"]), jnp.float32)
        y, tail = jax.eval_shape(causal_conv, x, w)
        assert y.shape == x.shape and tail.shape == (shape["B"], shape["I"] - 1, shape["D"])
