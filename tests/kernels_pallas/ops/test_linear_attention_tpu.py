"""Tests linear_attention's TPU kernels beside the conformance suite: sizes and tilings,
interpreted; every TPU, compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import linear_attention
from kernels_pallas.dispatch import devices
from kernels_pallas.ops.linear_attention.shapes import SHAPES
from kernels_pallas.ops.linear_attention.tpu.tiling import VMEM_BYTES, tiling_of
from kernels_pallas.tools import tpu_compile
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    assert_close,
    documents,
    everything,
    inputs_of,
    truth,
)
from tests.kernels_pallas.ops.test_linear_attention import CASE


def _check(shape, regime, segment_ids=None, **keywords):
    inputs = inputs_of(CASE, shape, regime)

    def call(inputs, **others):
        return CASE.call(inputs, **others, **keywords)

    with devices.interpreted():
        got = everything(dataclasses.replace(CASE, call=call), "pallas_tpu", inputs, segment_ids)
    assert_close(got, truth(CASE, inputs, segment_ids), TOLERANCE["float32"])


@pytest.mark.parametrize("regime", ["per_token mixed", "per_channel mixed"])
@pytest.mark.parametrize("chunk_size", [16, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_chunk_sizes(chunk_size, regime):
    _check(Shape(B=1, T=140, H=1, G=1), regime, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["none", "per_token resets", "per_channel mixed"])
@pytest.mark.parametrize(
    "K, V", [(64, 64), (128, 64), (64, 192), (100, 130), (256, 256), (128, 513)]
)
def test_widths(K, V, regime):
    """Widths of whole and half registers, and others; V = 513 is mLSTM's with its normaliser."""
    _check(Shape(B=1, T=40, H=2, G=2, K=K, V=V), regime, chunk_size=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "G, H, K, V",
    [
        (1, 8, 16, 64),  # a key head over several steps of four value heads
        (2, 16, 128, 32),
        (3, 3, 8, 12),
        (5, 5, 64, 64),  # no even number of heads: widened to 128
        (4, 8, 64, 64),
    ],
)
def test_heads(G, H, K, V):
    for regime in ("per_token mixed", "per_channel mixed"):
        _check(Shape(B=2, T=40, H=H, G=G, K=K, V=V), regime, documents(2, 40), chunk_size=16)


def test_tilings():
    def cut(G, H, K, V, decay=None):
        q, v = (jnp.zeros((1, 8, n, w), jnp.bfloat16) for n, w in ((G, K), (H, V)))
        g = None if decay is None else jnp.zeros((1, 8, H, decay))
        tiling = tiling_of(q, q, v, g, None, None, 1.0)
        return tiling.K, tiling.V, tiling.heads, tiling.keys, tiling.shared

    assert cut(16, 16, 128, 128) == (128, 128, 4, 4, 1)
    assert cut(16, 16, 128, 128, decay=128) == (128, 128, 2, 2, 1)
    assert cut(1, 80, 128, 64) == (128, 64, 4, 1, 20)
    assert cut(8, 8, 64, 64) == (64, 64, 4, 4, 1)
    assert cut(5, 5, 64, 64) == (128, 128, 1, 1, 1)
    assert cut(8, 8, 256, 513) == (256, 576, 2, 2, 1)


@pytest.mark.parametrize(
    "dtype, K, V, chunk_size, message",
    [
        ("float16", 8, 8, None, "q is float16; it takes float32 and bfloat16 .'chunked' takes any"),
        ("float32", 8, 8, 2048, r"chunks of 2048 take \d+ MiB of VMEM, of 40: give chunk_size=256"),
        ("float32", 2048, 2048, None, r"K = 2048, V = 2048 and .* of VMEM, of 40: use 'chunked'"),
    ],
)
def test_what_does_not_fit_is_said_before_compiling(dtype, K, V, chunk_size, message):
    q, v = (jax.ShapeDtypeStruct((1, 4096, 1, n), dtype) for n in (K, V))

    def call(q, k, v):
        return linear_attention(q, k, v, chunk_size=chunk_size, implementation="pallas_tpu")

    with devices.interpreted(), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, q, q, v)


def test_none_takes_the_kernel_on_a_tpu_and_the_chunked_form_where_it_does_not_fit():
    def kernels(dtype):
        x = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
        with tpu_compile.tracing_for("v6e"):
            return str(jax.make_jaxpr(lambda x: linear_attention(x, x, x))(x)).count("pallas_call")

    assert kernels(jnp.float32) == 1
    assert kernels(jnp.float16) == 0


def _with_gradients(inputs, cotangents):
    def call(inputs):
        return CASE.call(inputs, implementation="pallas_tpu")

    outputs, vjp = jax.vjp(call, inputs)
    return outputs, vjp(cotangents)


def _abstract(name, dtype):
    """Inputs and cotangents of a published shape, without its batch, which changes the grid
    alone."""
    s = SHAPES[name]
    T, G, H, K, V = (s[n] for n in "TGHKV")
    decay = {"per_head": (H,), "per_token": (1, T, H), "per_channel": (1, T, H, K)}[s["decay"]]
    struct = jax.ShapeDtypeStruct
    inputs = {"q": struct((1, T, G, K), dtype), "k": struct((1, T, G, K), dtype)}
    inputs |= {"v": struct((1, T, H, V), dtype), "log_decay": struct(decay, jnp.float32)}
    inputs |= {"initial_state": struct((1, H, K, V), jnp.float32)}
    return inputs, (inputs["v"], inputs["initial_state"])


def _tiling(inputs):
    def tiling(q, k, v, log_decay, initial_state):
        del initial_state
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay[None, None], v.shape[:3])
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        tilings.append(tiling_of(q, k, v, log_decay, None, None, 1.0))
        return q

    tilings = []
    jax.eval_shape(lambda inputs: tiling(**inputs), inputs)
    return tilings[0]


LARGEST = [("v6e", "gla_1.3b", jnp.bfloat16), ("v5e", "mlstm_7b", jnp.float32)]
FAST = [("v6e", "small", jnp.bfloat16)]
COMPILED = [(part, name, jnp.bfloat16) for part in tpu_compile.PARTS for name in SHAPES]
COMPILED += [("v5e", name, jnp.float32) for name in ("small", "small_channel", "mlstm_7b")]


def _marks(part, name, dtype):
    """CI compiles every kernel for every TPU in the shape that compiles fastest, and the largest
    shapes for one."""
    if (part, name, dtype) in FAST:
        return []
    everywhere = name in ("mamba2_2.7b", "small_channel") and dtype == jnp.bfloat16
    in_ci = everywhere or (part, name, dtype) in LARGEST
    return [pytest.mark.slow] if in_ci else [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "part, name, dtype",
    [
        pytest.param(*x, marks=_marks(*x), id=f"{x[0]}-{x[1]}-{jnp.dtype(x[2]).name}")
        for x in COMPILED
    ],
)
def test_compiles(part, name, dtype):
    """Both passes compile, within the VMEM that the tiling estimates."""
    inputs, cotangents = _abstract(name, dtype)
    compiled = tpu_compile.compile_for(part, _with_gradients, inputs, cotangents)
    assert len(compiled.listings) == 2
    with tpu_compile.tracing_for(part):
        predicted = _tiling(inputs).vmem_bytes
    for listing in compiled.listings.values():
        assert 0 < listing.vmem_bytes <= min(1.25 * predicted, VMEM_BYTES)
