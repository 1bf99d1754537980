"""causal_conv: the conformance suite, and the tails that only a convolution has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import causal_conv
from kernels_pallas.dispatch import devices, tuning
from kernels_pallas.ops.causal_conv import api, reference, step
from kernels_pallas.ops.causal_conv.shapes import SHAPES
from kernels_pallas.ops.causal_conv.tpu import launch
from kernels_pallas.tools import tpu_bundles, tpu_compile
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    Suite,
    assert_close,
    at,
    cotangents_of,
    documents,
    everything,
    inputs_of,
    suite_case,
    truth,
)


def _step(token, state, **options):
    others = dict(token)
    return step(others.pop("x"), others.pop("w"), state, **others, **options)


CASE = suite_case(
    api.OPERATOR,
    implementations=("shifted", "pallas_tpu"),
    step=_step,
    typical=("width 4 bias silu norm", "width 4 bias"),
    fast=(
        *((1, "width 4 bias"), (100, "width 4 bias silu norm"), (64, "width 16")),
        (100, "width 2 silu"),
    ),
    fast_kernels=((100, "width 4 bias silu norm"),),
    kernels_skip=lambda T, regime: (
        (T, regime)
        not in (
            *((1, "width 2 silu"), (100, "width 4 bias silu norm"), (1000, "width 16")),
            (1000, "width 4 bias silu norm"),
        )
    ),
    grouped=False,
)


class TestCausalConv(Suite):
    case = CASE

    def test_causality_by_gradient(self, implementation, typical):
        """The output at t takes a gradient from its last `width` tokens and from no other."""
        inputs = inputs_of(self.case, Shape(B=1, T=40), typical)
        call = at(self.case, typical).call

        @jax.jit
        def seen_from(t):
            def output(x):
                y_BTD, _ = call({**inputs, "x": x}, implementation=implementation)
                return y_BTD[0, t].sum()

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


def test_what_follows_the_sums_against_numpy():
    """silu(z) = z / (1 + exp(-z)), then each head over sqrt(sum of squares + eps)."""
    rng = np.random.default_rng(2)
    x, w, bias = (
        rng.standard_normal((1, 20, 6)),
        rng.standard_normal((1, 6)),
        rng.standard_normal(6),
    )
    z = x * w[None] + bias[None, None]
    a = z / (1 + np.exp(-z))
    heads = a.reshape(1, 20, 2, 3)
    expected = heads / np.sqrt((heads**2).sum(-1, keepdims=True) + 0.5)
    x, w, bias = (jnp.asarray(z, jnp.float32) for z in (x, w, bias))
    got, _ = causal_conv(x, w, bias=bias, activation="silu")
    np.testing.assert_allclose(got, a, atol=2e-6)
    options = {"activation": "silu", "l2_norm_heads": 2, "eps": 0.5}
    got, _ = causal_conv(x, w, bias=bias, **options)
    np.testing.assert_allclose(got, expected.reshape(1, 20, 6), atol=2e-6)
    got, _ = step(x[:, 3], w, jnp.zeros((1, 0, 6)), bias=bias, **options)
    np.testing.assert_allclose(got, expected[:, 3].reshape(1, 6), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "D, heads, dtype",
    [
        pytest.param(384, 3, "bfloat16", marks=pytest.mark.exhaustive),  # heads of one register
        (256, 1, "float32"),  # of two
        pytest.param(384, 2, "float32", marks=pytest.mark.exhaustive),  # two in three
        (600, 25, "bfloat16"),  # 16 in three, and channels missing from the last group
    ],
)
def test_heads_and_registers(D, heads, dtype):
    """Packed, with more than one chunk, against the definition."""
    shape = Shape(B=2, T=40, K=D)
    inputs = inputs_of(CASE, shape, "width 4 bias silu norm")
    inputs = {name: x.astype(jnp.dtype(dtype)) for name, x in inputs.items()}
    options = {"activation": "silu", "l2_norm_heads": heads}

    def call(inputs, **keywords):
        return CASE.call(inputs, **options, **keywords)

    case, ids = dataclasses.replace(CASE, call=call), documents(2, 40)
    sizes = {"causal_conv/pallas_tpu": {"chunk_size": 16, "width": 256}}
    shapes = jax.eval_shape(lambda x: call(x, implementation="reference"), inputs)
    cotangents = tuple(
        c.astype(shape.dtype).astype(c.dtype) for c, shape in zip(cotangents_of(*shapes), shapes)
    )
    with devices.interpreted(), tuning.trying(sizes):
        got = everything(case, "pallas_tpu", inputs, ids, cotangents)
    assert_close(got, truth(case, inputs, ids, cotangents), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("part", tpu_compile.PARTS)
def test_kernels_compile_for_tpus(part):
    """Forward and backward, within the VMEM that was predicted, each array moved once."""
    x = jax.ShapeDtypeStruct((1, 2048, 2048), jnp.bfloat16)
    w, ids = (
        jax.ShapeDtypeStruct((4, 2048), jnp.float32),
        jax.ShapeDtypeStruct((1, 2048), jnp.int32),
    )

    def both(x, w, ids, g):
        def conv(x, w):
            options = {"activation": "silu", "l2_norm_heads": 16, "segment_ids": ids}
            return causal_conv(x, w, implementation="pallas_tpu", **options)[0]

        y, vjp = jax.vjp(conv, x, w)
        return y, vjp(g)

    program = tpu_bundles.measure(part, both, x, w, ids, x)
    assert [k.name for k in program.kernels] == ["causal_conv_backward", "causal_conv_forward"]
    finish = reference.Finish("silu", 16)
    tiling = launch.Tiling.of(x, w, None, ids, finish)
    for kernel in program.kernels:
        assert 0 < kernel.vmem_bytes < tiling.vmem_bytes < launch.VMEM_BYTES
        assert kernel.hbm_bytes <= 1.1 * kernel.least_hbm_bytes
    assert program.hbm_bytes <= 2 * program.least_hbm_bytes


def test_a_kernel_serves_where_it_can_and_decoding_needs_none():
    w = jnp.ones((4, 8))

    def kernels(x, **options):
        return str(jax.make_jaxpr(lambda x: causal_conv(x, w, **options))(x)).count("pallas_call")

    with tpu_compile.tracing_for("v6e"):
        assert kernels(jnp.ones((1, 16, 8))) == 1
        assert kernels(jnp.ones((1, 16, 8), jnp.complex64)) == 0
        assert kernels(jnp.ones((1, 15, 8))) == 0
        assert kernels(jnp.ones((1, 1, 8)), implementation="pallas_tpu") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_BTD": jnp.zeros((2, 5, 600), jnp.float16)}, "x is float16; it takes float32 and bfl"),
        ({"w": jnp.zeros((18, 600))}, "the width is 18; it takes up to 17"),
        (
            {"l2_norm_heads": 6},
            "heads of 100 channels fill registers of 128 only in groups of 3200",
        ),
        (
            {"x_BTD": jnp.zeros((1, 5, 1 << 18)), "w": jnp.zeros((4, 1 << 18))},
            "262144 channels take .* MiB of VMEM, of 40",
        ),
    ],
)
def test_the_kernel_says_what_it_does_not_take(change, message):
    arguments = {"x_BTD": jnp.zeros((2, 5, 600)), "w": jnp.zeros((4, 600)), **change}
    with devices.interpreted(), pytest.raises(NotImplementedError, match=message):
        causal_conv(**arguments, implementation="pallas_tpu")


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
        ({"x_BTD": jnp.zeros((5, 3))}, r"x must be \(B, T, D\); got \(5, 3\)"),
        ({"x_BTD": jnp.zeros((2, 5, 3), int)}, "x must be floating or complex; got int"),
        ({"w": jnp.zeros((3, 4))}, r"w must be \(width, D\) .* D = 3; got \(3, 4\)"),
        ({"w": jnp.zeros((0, 3))}, r"width > 0"),
        ({"bias": jnp.zeros(4)}, r"bias has shape \(4,\); expected \(3,\)"),
        ({"initial_state": jnp.zeros((2, 4, 3))}, r"\(2, 4, 3\); expected \(2, 3, 3\)"),
        ({"segment_ids": jnp.zeros((2, 4))}, r"segment_ids has shape \(2, 4\); expected \(2, 5\)"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids has dtype float32; expected integers"),
        ({"activation": "gelu"}, "activation is 'gelu'; expected None or 'silu'"),
        ({"l2_norm_heads": 2}, "l2_norm_heads is 2; it must divide x's D = 3"),
        ({"l2_norm_heads": 0}, "l2_norm_heads is 0; it must divide"),
        ({"x_BTD": jnp.zeros((2, 5, 3), complex), "l2_norm_heads": 1}, "needs a real x; got compl"),
        ({"implementation": "fft"}, "'pallas_tpu', 'shifted', 'reference'"),
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


@pytest.mark.parametrize("complex_one", ["w", "bias", "initial_state"])
@pytest.mark.parametrize("implementation", ["shifted", "reference"])
def test_a_real_input_keeps_the_imaginary_part_of_the_others(complex_one, implementation):
    """As for x made complex: values, gradients, and the tail, which is complex only where what
    entered is.
    """
    rng = np.random.default_rng(0)
    sizes = {"w": (3, 2), "bias": (2,), "initial_state": (1, 2, 2)}
    others = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    others[complex_one] = others[complex_one] * np.complex64(1 + 2j)
    x = rng.standard_normal((1, 5, 2)).astype(np.float32)
    ids = np.array([[1, 1, 1, 2, 2]])

    def results(x, others):
        y, tail = causal_conv(x, **others, segment_ids=ids, implementation=implementation)
        loss = jnp.sum(jnp.sin(3 * jnp.real(y)) + jnp.imag(y) ** 2) + jnp.sum(jnp.real(tail) ** 2)
        return loss, (y, tail)

    compute = jax.value_and_grad(results, (0, 1), has_aux=True)
    (_, (y, tail)), (dx, d_others) = compute(x, others)
    (_, (whole_y, whole_tail)), (whole_dx, whole_d) = compute(x.astype(np.complex64), others)
    assert y.dtype == np.complex64 and tail.dtype == others["initial_state"].dtype
    assert abs(np.imag(y)).max() > 0.1
    assert_close({"y": y, "tail": tail}, {"y": whole_y, "tail": whole_tail}, TOLERANCE["float32"])
    assert dx.dtype == x.dtype and all(d_others[n].dtype == others[n].dtype for n in others)
    expected = {
        "x": np.real(whole_dx),
        **{n: np.asarray(whole_d[n], others[n].dtype) for n in others},
    }
    assert_close({"x": dx, **d_others}, expected, TOLERANCE["float32"])
    # and token by token
    state, tokens = others["initial_state"], []
    for x_BD in x[:, :3].swapaxes(0, 1):
        y_BD, state = step(x_BD, others["w"], state, bias=others["bias"])
        tokens.append(y_BD)
    assert_close({"y": np.stack(tokens, 1)}, {"y": y[:, :3]}, TOLERANCE["float32"])
    assert state.dtype == others["initial_state"].dtype
