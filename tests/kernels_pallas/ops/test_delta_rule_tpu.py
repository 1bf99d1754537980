"""Tests delta_rule's TPU kernels: the conformance suite, sizes and tilings, interpreted; every TPU,
compiled."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta_rule
from kernels_pallas.dispatch import devices
from kernels_pallas.ops.delta_rule.shapes import SHAPES
from kernels_pallas.ops.delta_rule.tpu.tiling import VMEM_BYTES, tiling_of
from kernels_pallas.tools import tpu_compile
from kernels_pallas.tpu import primitives
from tests.kernels_pallas.ops.conformance import (
    LENGTHS,
    TOLERANCE,
    Shape,
    Suite,
    assert_close,
    documents,
    everything,
    inputs_of,
    truth,
)
from tests.kernels_pallas.ops.test_delta_rule import DELTA_RULE


class TestPallasTPU(Suite):
    """Runs every regime over eight chunks with documents, those of a decay per channel also
    without, and every other length with documents and the regimes of one kind of decay, in turn.

    The rest is exhaustive: each length and kind of decay is a program that takes tens of seconds to
    compile, while regimes that share it take one.
    """

    case = dataclasses.replace(DELTA_RULE, implementations=("pallas_tpu",))
    kind_at = {1: "per_token", 63: "per_channel", 64: "none", 100: "per_token", 128: "per_token"}
    fast = (100, "per_token resets")
    in_bfloat16_too = (100, "per_token mixed")
    # These take twelve seconds each, and what they test wraps every kernel alike.
    as_in_linear_attention = ("test_pieces_equal_whole", "test_transformations")

    test_what_is_not_finite_stays_apart = None  # kernels multiply by a mask

    def pytest_generate_tests(self, metafunc):
        names = metafunc.fixturenames
        if "implementation" in names:
            metafunc.parametrize("implementation", self.case.implementations)
        if "length_and_regime" in names:
            test = metafunc.function.__name__
            packed = test == "test_float32_packed_documents"
            marked = []
            for T, regime in itertools.product(LENGTHS, self.case.regimes):
                marks = [] if packed and (T, regime) == self.fast else [pytest.mark.slow]
                in_ci = test == "test_bfloat16" and (T, regime) == self.in_bfloat16_too
                other_test = not packed and not in_ci
                many_chunks_of_another_kind = (
                    T == 1000
                    and other_test
                    and (_kind(regime) != "per_channel" or test == "test_bfloat16")
                )
                if many_chunks_of_another_kind or (
                    T in self.kind_at and (other_test or self.kind_at[T] != _kind(regime))
                ):
                    marks.append(pytest.mark.exhaustive)
                marked.append(pytest.param((T, regime), marks=marks, id=f"T{T}-{regime}"))
            metafunc.parametrize("length_and_regime", marked)
        if "typical" in names:
            elsewhere = metafunc.function.__name__ in self.as_in_linear_attention
            mark = pytest.mark.exhaustive if elsewhere else pytest.mark.slow
            metafunc.parametrize(
                "typical", [pytest.param(x, marks=mark) for x in self.case.typical]
            )


def _kind(regime):
    words = regime.split()
    return words[-2] if words[-2:-1] and words[-2] in ("per_token", "per_channel") else "none"


def _check(shape, regime, segment_ids=None, dtype="float32", **keywords):
    inputs = inputs_of(DELTA_RULE, shape, regime)
    inputs = {
        name: x.astype(dtype) if name in DELTA_RULE.rounded else x for name, x in inputs.items()
    }

    def call(inputs, **others):
        return DELTA_RULE.call(inputs, **others, **keywords)

    case = dataclasses.replace(DELTA_RULE, call=call)
    with devices.interpreted():
        got = everything(case, "pallas_tpu", inputs, segment_ids)
    assert_close(got, truth(DELTA_RULE, inputs, segment_ids), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk_size, regime",
    [
        *((16, "per_token mixed"), (64, "per_channel mixed"), (256, "none")),
        pytest.param(256, "per_channel mixed", marks=pytest.mark.exhaustive),
    ],
)
def test_chunk_sizes(chunk_size, regime):
    _check(Shape(B=1, T=300, H=1, G=1), regime, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "K, V, regime",
    [
        pytest.param(64, 64, "none", marks=pytest.mark.exhaustive),
        (64, 64, "per_channel mixed"),
        (128, 64, "per_token mixed"),
        (100, 130, "none"),
        (100, 130, "per_channel mixed"),
        (256, 512, "per_token mixed"),
    ],
)
def test_widths(K, V, regime):
    """Widths of whole and half registers, and others."""
    _check(Shape(B=1, T=40, H=1, G=1, K=K, V=V), regime, chunk_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "G, H, K, V",
    [
        (1, 10, 128, 64),  # a key head over several steps: their gradients are added
        (2, 4, 64, 64),
        (3, 3, 64, 64),
        (5, 15, 64, 32),  # no whole lanes of 64: widened
    ],
)
def test_heads(G, H, K, V):
    for regime in ("none", "per_token mixed", "per_channel mixed"):
        shape = Shape(B=1, T=40, H=H, G=G, K=K, V=V)
        _check(shape, regime, documents(2, 40)[1:], chunk_size=16)


@pytest.mark.slow
def test_inverse_where_its_powers_explode():
    """Inverts I + A with A of 2s: the inverse stays within 2, where A's powers pass 1e30."""
    for C in (16, 64, 128, 256):
        A = np.tril(np.full((C, C), 2.0, np.float32), -1)
        expected = np.linalg.inv(np.eye(C) + A.astype(np.float64))
        for narrow in (False, True):
            with devices.interpreted():
                inverse = primitives.inverse(primitives.Products(narrow), jnp.asarray(A))
                (got,) = primitives.in_turns([inverse])
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_halving_sums_and_their_transpose():
    rng = np.random.default_rng(0)
    g = -rng.random((32, 8)).astype(np.float32)
    token = np.arange(32)
    sums = primitives.halving_sums(jnp.asarray(g))
    i, s = token[:, None], token[None]
    masks = [s <= i, s > i]
    for U in (1, 2, 4, 8, 16):
        same, right = s // U == i // U, (i & U) > 0
        masks.append(same & np.where(right, s <= i, s > i))
    for got, mask in zip(sums, masks, strict=True):
        np.testing.assert_allclose(got, mask.astype(np.float32) @ g, rtol=1e-5)
    cotangents = [rng.standard_normal(g.shape).astype(np.float32) for _ in masks]
    got = primitives.halving_sums_cotangent(*cotangents[:2], cotangents[2:])
    expected = sum(m.T.astype(np.float32) @ x for m, x in zip(masks, cotangents))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _published(name):
    """Arrays of a published shape. With few tokens XLA would place them in VMEM, which would count
    as the kernel's."""
    B, T, G, H, K, V = (SHAPES[name][n] for n in "BTGHKV")
    sizes = [(B, T, G, K), (B, T, G, K), (B, T, H, V)]
    arrays = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    arrays.append(jax.ShapeDtypeStruct((B, T, H), jnp.float32))
    decay = {"none": None, "per_token": (B, T, H), "per_channel": (B, T, H, K)}[
        SHAPES[name]["decay"]
    ]
    if decay is not None:
        arrays.append(jax.ShapeDtypeStruct(decay, jnp.float32))
    return arrays


def _forward_and_backward(*arrays, **keywords):
    def call(*arrays):
        return delta_rule(*arrays, implementation="pallas_tpu", **keywords)

    outputs, vjp = jax.vjp(call, *arrays)
    return outputs, vjp(outputs)


def _compiled():
    """CI compiles every kernel for every TPU in the shape that compiles fastest, and the largest
    shape for one."""
    kernels = ("delta_net_1.3b", "gated_delta_net_1.3b", "small_channel")
    for name in SHAPES:
        for part in tpu_compile.PARTS:
            in_ci = name in kernels or (name, part) == ("kimi_linear_48b", "v6e")
            marks = [pytest.mark.slow] if in_ci else [pytest.mark.exhaustive]
            yield pytest.param(name, part, marks=marks, id=f"{name}-{part}")


@pytest.mark.parametrize("name, part", list(_compiled()))
def test_compiles(name, part):
    """Both passes compile, within the VMEM that the tiling estimates."""
    arrays = _published(name)
    compiled = tpu_compile.compile_for(part, _forward_and_backward, *arrays)
    assert len(compiled.listings) == 2
    tiling = _tiling(part, arrays)
    for listing in compiled.listings.values():
        assert 0 < listing.vmem_bytes <= tiling.vmem_bytes <= VMEM_BYTES


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", tpu_compile.PARTS)
@pytest.mark.parametrize("name", ["delta_net_1.3b", "small", "small_channel"])
def test_float32_compiles(name, part):
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in _published(name)]
    compiled = tpu_compile.compile_for(part, _forward_and_backward, *arrays)
    for listing in compiled.listings.values():
        assert 0 < listing.vmem_bytes <= _tiling(part, arrays).vmem_bytes


def _tiling(part, arrays):
    q, k, v, _, *log_decay = arrays
    decay = None
    if log_decay:
        shape = log_decay[0].shape
        decay = jax.ShapeDtypeStruct(shape if len(shape) == 4 else (*shape, 1), jnp.float32)
    with tpu_compile.tracing_for(part):
        return tiling_of(q, k, v, decay, None, None, 1.0)


def test_unsupported():
    """A call that cannot run names its limit and what would run, before anything is compiled."""
    wide = [jax.ShapeDtypeStruct((1, 64, 1, 2048), jnp.bfloat16)] * 3
    beta = jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)
    with (
        devices.interpreted(),
        pytest.raises(NotImplementedError, match="MiB of VMEM, of 40: use 'chunked'"),
    ):
        jax.eval_shape(_forward_and_backward, *wide, beta)
    narrower = [jax.ShapeDtypeStruct((1, 4096, 1, 256), jnp.bfloat16)] * 3
    beta = jax.ShapeDtypeStruct((1, 4096, 1), jnp.float32)
    with (
        devices.interpreted(),
        pytest.raises(NotImplementedError, match="chunks of 2048 .* give chunk_size="),
    ):
        jax.eval_shape(lambda *x: _forward_and_backward(*x, chunk_size=2048), *narrower, beta)
    arrays = _published("small")
    with pytest.raises(NotImplementedError, match="it is a kernel for tpu; this is cpu"):
        jax.eval_shape(_forward_and_backward, *arrays)
    with devices.interpreted():  # a learned scale multiplies q before any kernel sees it
        jax.eval_shape(lambda c, *x: _forward_and_backward(*x, scale=c), jnp.ones(()), *arrays)
    half = [x if x.ndim == 3 else jax.ShapeDtypeStruct(x.shape, jnp.float16) for x in arrays]
    with (
        devices.interpreted(),
        pytest.raises(NotImplementedError, match="q is float16; it takes float32 and bfloat16"),
    ):
        jax.eval_shape(_forward_and_backward, *half)
