"""linear_attention: the conformance suite, and what only this operator promises."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_attention
from kernels_pallas.common import checks
from kernels_pallas.ops.linear_attention import api, step
from kernels_pallas.ops.linear_attention.shapes import SHAPES
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    Suite,
    assert_close,
    by_position,
    everything,
    inputs_of,
    suite_case,
    truth,
)


def _call(inputs, **keywords):
    return CASE.call(inputs, **keywords)


def _skip(T, regime):
    """All at one length and at many chunks; at the others the regimes of one kind of decay."""
    kinds = {1: "per_token", 63: "per_channel", 64: "none", 128: "per_token"}
    return T in kinds and not regime.startswith(kinds[T])


CASE = suite_case(
    api.OPERATOR,
    implementations=("chunked", "naive_chunk", "pallas_tpu"),
    step=by_position(step, "q", "k", "v"),
    typical=("per_token weak", "per_channel weak", "none"),
    fast=(
        *(
            (1, "per_token weak"),
            (100, "none"),
            (100, "per_token strong"),
            (100, "per_token resets"),
        ),
        *((100, "per_channel mixed"), (100, "per_channel resets"), (100, "per_channel extreme")),
    ),
    kernels_skip=_skip,
    fast_kernels=(
        (100, "per_token resets"),
        (100, "per_channel mixed"),
        (100, "per_channel extreme"),
    ),
)


class TestLinearAttention(Suite):
    case = CASE


def _arrays(B=2, T=5, G=2, H=2, K=8, V=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
    return {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}


def test_chunk_size_changes_rounding_only():
    inputs = inputs_of(CASE, Shape(T=130), "per_head")
    expected = truth(CASE, inputs)
    for chunk_size in (16, 64, 128):

        def call(inputs, chunk_size=chunk_size, **keywords):
            return _call(inputs, chunk_size=chunk_size, **keywords)

        got = everything(dataclasses.replace(CASE, call=call), "chunked", inputs)
        assert_close(got, expected, TOLERANCE["float32"])


def test_scale_multiplies_the_output():
    x = _arrays(T=20)
    plain, state = _call(x, scale=1)
    scaled, same_state = _call(x, scale=0.3)
    np.testing.assert_allclose(scaled, 0.3 * plain, rtol=1e-6)
    np.testing.assert_array_equal(state, same_state)
    default, _ = _call(x)
    np.testing.assert_allclose(default, plain / np.sqrt(8), rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        inputs = {
            name: x.astype(np.float64)
            for name, x in inputs_of(CASE, Shape(T=40), "per_channel mixed").items()
        }
        got = everything(CASE, "chunked", inputs)
        assert all(x.dtype == np.float64 for x in got.values())
        assert_close(got, truth(CASE, inputs), 1e-12)


@pytest.mark.parametrize("wide", ["k", "log_decay"])
def test_one_float64_input_makes_float64_states(wide):
    x = {name: jax.ShapeDtypeStruct(z.shape, z.dtype) for name, z in _arrays(T=20).items()}
    with jax.enable_x64(True):
        x["log_decay"] = jax.ShapeDtypeStruct(x["v"].shape[:3], np.float32)
        x[wide] = jax.ShapeDtypeStruct(x[wide].shape, np.float64)
        o, state = jax.eval_shape(lambda x: linear_attention(**_renamed(x)), x)
    assert o.dtype == np.float32 and state.dtype == np.float64


def test_bfloat16_keeps_its_output_and_float32_states():
    x = {name: array.astype(jnp.bfloat16) for name, array in _arrays(T=20).items()}
    o, state = jax.eval_shape(lambda x: linear_attention(**_renamed(x)), x)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_memory_of_the_backward_pass_is_not_T_states():
    """What the compiled gradient allocates is a few times the inputs; a state for each token would
    be 64 times."""
    T, K = 4096, 64
    x = {name: jax.ShapeDtypeStruct((1, T, 1, K), jnp.float32) for name in "qkv"}
    x["log_decay"] = jax.ShapeDtypeStruct((1, T, 1), jnp.float32)

    def loss(x):
        o, state = _call(x)
        return jnp.sum(o**2) + jnp.sum(state**2)

    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * T * K * 4


def test_a_shared_key_head_is_not_copied():
    """With one decay a head, no array of the program has q's or k's width once for every value
    head."""
    B, T, G, H, K, V = 1, 128, 1, 6, 40, 24
    x = {name: jnp.zeros(x.shape) for name, x in _arrays(B, T, G, H, K, V).items()}
    x["log_decay"] = jnp.zeros((B, T, H))
    text = jax.jit(jax.grad(lambda x: jnp.sum(_call(x)[0]))).lower(x).as_text()
    sizes = [
        np.prod([int(n) for n in dims.rstrip("x").split("x")])
        for dims in re.findall(r"tensor<((?:\d+x)+)f32>", text)
    ]
    assert B * T * G * K in sizes and B * T * H * V in sizes
    assert B * T * H * K not in sizes and B * 64 * H * K not in sizes


def _renamed(x):
    return {{"q": "q_BTHK", "k": "k_BTHK", "v": "v_BTHV"}.get(n, n): x for n, x in x.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": np.zeros((2, 5, 16))}, r"must be \(B, T, heads, dim\); got q \(2, 5, 16\)"),
        ({"k": np.zeros((2, 6, 2, 8))}, r"must share batch and time; .* k \(2, 6, 2, 8\)"),
        ({"k": np.zeros((2, 5, 2, 7))}, "must share their last dimension K"),
        ({"v": np.zeros((2, 5, 3, 4))}, "G must divide v's heads H"),
        ({"q": np.zeros((2, 5, 2, 8), int)}, "q has dtype int64; expected a floating dtype"),
        (
            {"log_decay": np.zeros((2, 5))},
            r"\(2, 5\); expected \(2,\) or \(2, 5, 2\) or \(2, 5, 2, 8\)",
        ),
        ({"log_decay": np.zeros(2, int)}, "log_decay has dtype int64"),
        ({"initial_state": np.zeros((2, 2, 4, 8))}, r"\(2, 2, 4, 8\); expected \(2, 2, 8, 4\)"),
        ({"segment_ids": np.zeros((5,), int)}, r"segment_ids has shape \(5,\); expected \(2, 5\)"),
        ({"segment_ids": np.zeros((2, 5))}, "segment_ids has dtype float64; expected integers"),
        ({"scale": np.ones(2)}, "expected a number or None"),
        ({"chunk_size": 48}, "chunk_size is 48; expected a power of two, 16 or more"),
        (
            {"implementation": "fast"},
            "choose one of 'one_token', 'pallas_tpu', 'triton', 'chunked', 'naive_chunk', 'reference', or None",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**_renamed({**_arrays(), **change}))


def test_positive_log_decay_is_found_with_checks_on():
    x = _renamed(_arrays())
    positive, legal = np.array([-1.0, 0.25], np.float32), np.array([-np.inf, 0.0], np.float32)
    linear_attention(**x, log_decay=positive)
    with checks.enabled():
        linear_attention(**x, log_decay=legal)
        with pytest.raises(ValueError, match="log_decay must be <= 0 .* largest value is 0.25"):
            linear_attention(**x, log_decay=positive)
        with pytest.raises(Exception, match="largest value is 0.25"):
            jax.block_until_ready(jax.jit(lambda g: linear_attention(**x, log_decay=g))(positive))
            jax.effects_barrier()


def test_one_token_is_for_one_token():
    x = _arrays(T=1)
    expected = _call(x, implementation="reference")
    got = _call(x, implementation="one_token")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    with pytest.raises(NotImplementedError, match="'one_token' cannot run here: .* got T = 5"):
        _call(_arrays(T=5), implementation="one_token")


def test_published_shapes_fit():
    for name, shape in SHAPES.items():
        B, T, G, H, K, V = (shape[n] for n in "BTGHKV")
        sizes = {"q": (B, T, G, K), "k": (B, T, G, K), "v": (B, T, H, V)}
        x = {n: jax.ShapeDtypeStruct(size, jnp.bfloat16) for n, size in sizes.items()}
        decays = {"per_head": (H,), "per_token": (B, T, H), "per_channel": (B, T, H, K)}
        x["log_decay"] = jax.ShapeDtypeStruct(decays[shape["decay"]], jnp.float32)
        o, state = jax.eval_shape(_call, x)
        assert o.shape == (B, T, H, V) and state.shape == (B, H, K, V), name
