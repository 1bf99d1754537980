"""Lowers random legal calls of every operator with TPU kernels for a TPU, with their gradients.

A kernel refuses a call before it is lowered, and Mosaic lowers every call that it accepts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    causal_conv,
    delta_rule,
    diagonal_scan,
    document_sums,
    linear_attention,
    softmax_attention,
)
from kernels_pallas.tools import tpu_compile

f32, bf16 = jnp.float32, jnp.bfloat16


def _recurrence(operator, pick, dtype, B, T):
    G, shared = pick(1, 1, 2, 3, 4), pick(1, 2, 3, 4, 5, 8, 16)
    K, V = pick(1, 8, 64, 100, 128, 192, 256), pick(1, 64, 128, 130, 256)
    return _recurrence_of(
        operator, pick("none", "per_token", "per_channel"), dtype, B, T, G, G * shared, K, V
    )


def _recurrence_of(operator, decay, dtype, B, T, G, H, K, V):
    arrays = [((B, T, G, K), dtype), ((B, T, G, K), dtype), ((B, T, H, V), dtype)]
    if operator is delta_rule:
        arrays.append(((B, T, H), f32))
    if decay != "none":
        arrays.append(((B, T, H) if decay == "per_token" else (B, T, H, K), f32))
    return operator, arrays


def _scan(pick, dtype, B, T):
    D = pick(1, 100, 128, 130, 300, 1024)
    if pick(False, True):
        dtype = jnp.complex64
    decay = f32 if dtype is not jnp.complex64 else dtype
    call = functools.partial(diagonal_scan, reverse=pick(False, True))
    return call, [((B, T, D), dtype), (pick((B, T, D), (D,)), decay)]


def _conv(pick, dtype, B, T):
    D, width = pick(1, 96, 128, 130, 192, 300, 1024), pick(1, 2, 4, 17)
    heads = pick(None, *(n for n in (1, 2, 3, 5, 10) if D % n == 0))
    call = functools.partial(causal_conv, activation=pick(None, "silu"), l2_norm_heads=heads)
    return call, [((B, T, D), dtype), ((width, D), dtype)]


def _attention(pick, dtype, B, T):
    G, shared = pick(1, 2, 3), pick(1, 2, 5)
    K, V = pick(1, 64, 100, 128, 256), pick(1, 64, 128, 130)
    call = functools.partial(
        softmax_attention, causal=pick(True, False), window=pick(None, 1, 5, 100)
    )
    return call, [((B, T, G * shared, K), dtype), ((B, T, G, K), dtype), ((B, T, G, V), dtype)]


def _documents(pick, dtype, B, T):
    call = functools.partial(document_sums, block_size=pick(None, None, 7, 32))
    _, arrays = _recurrence_of(
        *(document_sums, "none", dtype, B, T),
        *((G := pick(1, 2, 3, 4)), G * pick(1, 2, 5)),
        *(pick(1, 8, 32, 64, 112, 128, 256), pick(1, 32, 64, 128, 130)),
    )
    return call, arrays


OPERATORS = {
    "linear_attention": functools.partial(_recurrence, linear_attention),
    "delta_rule": functools.partial(_recurrence, delta_rule),
    "diagonal_scan": _scan,
    "causal_conv": _conv,
    "document_sums": _documents,
    "softmax_attention": _attention,
}


def _random_call(operator, seed):
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    B, T, dtype = pick(1, 2, 3), pick(1, 2, 7, 16, 63, 64, 100, 129, 300), pick(f32, bf16)
    call, arrays = OPERATORS[operator](pick, dtype, B, T)
    return call, arrays, pick(False, True)


def _with_gradients(call, arrays, packed):
    """Returns a function of the arrays (and ids), and their shapes."""
    shapes = [jax.ShapeDtypeStruct(*x) for x in arrays]
    ids = [jax.ShapeDtypeStruct(arrays[0][0][:2], jnp.int32)] if packed else []

    def function(*arrays_and_ids):
        arrays, ids = arrays_and_ids[: len(shapes)], arrays_and_ids[len(shapes) :]
        keywords = {"segment_ids": ids[0]} if ids else {}
        outputs, vjp = jax.vjp(lambda *arrays: call(*arrays, **keywords), *arrays)
        return outputs, vjp(outputs)

    return function, *shapes, *ids


def _kernels(function, *shapes) -> int:
    """Counts the kernels that a call is lowered to."""
    with tpu_compile.tracing_for("v6e"):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


# Key heads with more value heads than a grid step takes: their blocks are less than a register
# wide, and the array holds several.
GROUPED = [
    (linear_attention, "per_channel", bf16, 1, 64, 1, 3, 64, 128),
    (linear_attention, "per_channel", f32, 1, 64, 1, 4, 192, 128),
    (delta_rule, "none", bf16, 1, 64, 1, 16, 64, 64),
    (delta_rule, "none", f32, 1, 64, 1, 4, 64, 128),
    (delta_rule, "per_channel", f32, 1, 64, 2, 6, 64, 64),
]


@pytest.mark.parametrize("call", GROUPED, ids=lambda x: f"{x[0].__name__}-{x[1]}-H{x[6]}")
def test_groups_larger_than_a_step(call):
    assert _kernels(*_with_gradients(*_recurrence_of(*call), packed=False)) == 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_calls_lower(operator):
    kernels = [_kernels(*_with_gradients(*_random_call(operator, seed))) for seed in range(4)]
    assert any(kernels)


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_random_calls_lower(operator):
    for seed in range(100, 250):
        _kernels(*_with_gradients(*_random_call(operator, seed)))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(100, 112), marks=pytest.mark.exhaustive)], ids=len
)
def test_random_calls_compile(operator, seeds):
    for seed in seeds:
        tpu_compile.compile_for("v6e", *_with_gradients(*_random_call(operator, seed)))
