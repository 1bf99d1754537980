"""Gradients of gradients, of every operator and implementation, against the float64 definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels_pallas import context_parallel, linear_cross_entropy, softmax_attention
from kernels_pallas.dispatch import devices
from kernels_pallas.ops.softmax_attention import api, library, reference
from tests.kernels_pallas.ops import (
    test_causal_conv,
    test_delta_rule,
    test_diagonal_scan,
    test_document_sums,
    test_linear_attention,
)
from tests.kernels_pallas.ops.conformance import Shape, assert_close, at, documents, inputs_of

TOLERANCE = 1e-4
CASES = {
    "linear_attention": test_linear_attention.CASE,
    "delta_rule": test_delta_rule.DELTA_RULE,
    "diagonal_plus_low_rank": test_delta_rule.DIAGONAL_PLUS_LOW_RANK,
    "diagonal_scan": test_diagonal_scan.CASE,
    "document_sums": test_document_sums.CASE,
    "causal_conv": test_causal_conv.CASE,
}


def _wavy(tree):
    """A number that depends on every entry, and bends with it."""
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(jnp.sin(jnp.real(x)) + jnp.cos(jnp.imag(x))) for x in leaves)


def _derivative(function, inputs, order):
    """The gradient of that number of the gradient ... of the results."""
    for _ in range(order):
        function = jax.grad(lambda inputs, function=function: _wavy(function(inputs)))
    return jax.jit(function)(inputs)


def _compare(call, inputs, implementation, order=2):
    """call: (inputs, implementation) -> results."""
    with devices.interpreted():
        got = _derivative(functools.partial(call, implementation=implementation), inputs, order)
    with jax.enable_x64(True):
        wide = {
            name: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
            for name, x in inputs.items()
        }
        expected = _derivative(functools.partial(call, implementation="reference"), wide, order)
        expected = {name: np.asarray(x) for name, x in expected.items()}
    assert_close(got, expected, TOLERANCE)


def _recurrences():
    """(operator, regime, implementation); kernels take seconds to compile, so few are fast."""
    fast = {
        *(("diagonal_scan", "log resets", x) for x in ("chunked", "triton")),
        ("causal_conv", "width 4 bias silu norm", "pallas_tpu"),
        ("causal_conv", "width 4 bias silu norm", "shifted"),
    }
    regimes = {
        "linear_attention": ("none", "per_token mixed", "per_channel mixed"),
        "delta_rule": ("none", "per_token mixed", "per_channel mixed"),
        "diagonal_plus_low_rank": ("per_channel mixed",),
        "diagonal_scan": ("log resets", "complex weak"),
        "document_sums": ("whole", "blocks of 7"),
        "causal_conv": ("width 4 bias silu norm",),
    }
    for operator, names in regimes.items():
        implementations = CASES[operator].implementations
        forms = [name for name in implementations if name not in ("one_token", "reference")]
        if operator in ("linear_attention", "delta_rule", "diagonal_scan"):
            forms = ["chunked", "pallas_tpu", "triton"]
        for regime in names:
            for form in forms:
                if form == "triton" and regime.startswith("complex"):
                    continue
                marks = [] if (operator, regime, form) in fast else [pytest.mark.slow]
                if operator == "delta_rule" and form != "chunked" and regime != "per_token mixed":
                    marks.append(pytest.mark.exhaustive)
                label = f"{operator}-{regime}-{form}"
                yield pytest.param(operator, regime, form, marks=marks, id=label)


@pytest.mark.parametrize("operator, regime, implementation", list(_recurrences()))
def test_recurrences(operator, regime, implementation):
    case = CASES[operator]
    G = 1 if case.grouped else 2
    inputs = inputs_of(case, Shape(B=2, T=20, H=2, G=G, K=4, V=4), regime)
    call = functools.partial(at(case, regime).call, segment_ids=documents(2, 20))
    _compare(call, inputs, implementation)


@pytest.mark.slow
def test_a_third_derivative_of_a_kernel():
    case = CASES["diagonal_scan"]
    inputs = inputs_of(case, Shape(B=1, T=12, K=4), "weak")
    _compare(case.call, inputs, "pallas_tpu", order=3)


def _attention_inputs(T):
    rng = np.random.default_rng(0)
    sizes = {"q": (2, T, 2, 4), "k": (2, T, 1, 4), "v": (2, T, 1, 6)}
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize(
    "implementation, T, window",
    [
        ("chunked", 129, 20),  # more than one block, the last one hardly begun
        pytest.param("chunked", 129, None, marks=pytest.mark.slow),
        pytest.param("splash", 40, None, marks=pytest.mark.slow),
        ("xla", 20, None),
    ],
)
def test_softmax_attention(implementation, T, window):
    ids = documents(2, T)

    def call(x, implementation):
        return softmax_attention(
            *(x["q"], x["k"], x["v"]),
            window=window,
            segment_ids=ids,
            implementation=implementation,
        )

    _compare(call, _attention_inputs(T), implementation)


def test_a_library_with_one_derivative(monkeypatch):
    """cuDNN's, in whose place something stands that can be differentiated once, as it can."""
    plain = jax.nn.dot_product_attention

    def once(q, k, v, *, scale, is_causal, **others):
        def attend(*qkv):
            return plain(*qkv, scale=scale, is_causal=is_causal, implementation="xla")

        def backward(qkv, g):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), qkv)
            return jax.pure_callback(lambda qkv, g: jax.vjp(attend, *qkv)[1](g), shapes, qkv, g)

        attend_once = jax.custom_vjp(attend)
        attend_once.defvjp(lambda *qkv: (attend_once(*qkv), qkv), backward)
        return attend_once(q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", once)
    visibility = api._visibility((2, 6), 6, (None, None), (None, None), True, None)

    def call(x, implementation):
        attend = library.cudnn if implementation == "cudnn" else reference.naive
        return attend(x["q"], x["k"], x["v"], visibility, 0.5)

    _compare(call, _attention_inputs(6), "cudnn")


@pytest.mark.slow
def test_softmax_attention_on_a_ring():
    ids = documents(2, 40)
    mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
    time = jax.sharding.PartitionSpec(None, "seq")

    def call(x, implementation):
        if implementation == "reference":
            qkv = x["q"], x["k"], x["v"]
            return softmax_attention(*qkv, segment_ids=ids, implementation="reference")

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(time,) * 4, out_specs=time, check_vma=False
        )
        def sharded(q, k, v, ids):
            attend = context_parallel.softmax_attention
            return attend(q, k, v, axis_name="seq", segment_ids=ids, collective=implementation)

        return sharded(x["q"], x["k"], x["v"], ids)

    _compare(call, _attention_inputs(40), "ring")


def test_linear_cross_entropy():
    rng = np.random.default_rng(0)
    sizes = {"x": (2, 10, 4), "matrix": (7, 4)}
    inputs = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    words = rng.integers(0, 7, (2, 10)).astype(np.int32)

    def call(x, implementation):
        chunk_size = 4 if implementation == "chunked" else None
        return linear_cross_entropy(
            *(x["x"], x["matrix"], words), chunk_size=chunk_size, implementation=implementation
        )

    _compare(call, inputs, "chunked")
