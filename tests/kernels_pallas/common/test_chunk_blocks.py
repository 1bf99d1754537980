"""How long blocks of chunks are, what their scan computes, and how its outputs are written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    delta_rule,
    diagonal_plus_low_rank,
    diagonal_scan,
    linear_attention,
    linear_cross_entropy,
    softmax_attention,
)
from kernels_pallas.common import chunk_blocks
from kernels_pallas.dispatch import devices


@pytest.mark.parametrize(
    "chunks, heads, widest, expected",
    [
        (32, 4, 64, 4),  # 16 pairs
        (32, 4, 256, 1),  # 4
        (10, 4, 64, 4),  # 4, 4 and 2: no more even with three
        (9, 4, 64, 3),  # 3, 3 and 3, not 4, 4 and 1
        (3, 1, 64, 3),  # no longer than the sequence
        (32, 100, 64, 1),  # every head, at least one chunk
        (32, 1, 4096, 1),
    ],
)
def test_on_cpu_a_block_stays_in_cache(chunks, heads, widest, expected):
    assert chunk_blocks.chunks_per_block(chunks, heads, widest, accelerator_pairs=64) == expected


def test_on_an_accelerator_a_block_is_as_large_as_asked_for(monkeypatch):
    monkeypatch.setattr(devices, "current", lambda: devices.Target("gpu", "any"))
    assert chunk_blocks.chunks_per_block(32, 4, 64) == 32
    assert chunk_blocks.chunks_per_block(32, 4, 64, accelerator_pairs=64) == 16
    assert chunk_blocks.chunks_per_block(32, 100, 64, accelerator_pairs=64) == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scan_over_blocks(reverse, dtype):
    """A running sum of blocks, whose state, entries and results are those of a plain loop."""
    L, N = 4, 3
    x_BT = jnp.arange(24, dtype=dtype).reshape(2, 12)
    entry_N = jnp.array([1, 10, 100], dtype)

    def block(state_B, entry, x_BL):
        return entry * x_BL, state_B + jnp.sum(x_BL, axis=1), state_B

    outputs, final_B, entered_NB = chunk_blocks.scan(
        block, jnp.zeros(2, dtype), x_BT, x_BT, L, per_block=entry_N, reverse=reverse
    )
    assert outputs.dtype == dtype
    sums_BN = x_BT.reshape(2, N, L).sum(axis=2)
    np.testing.assert_array_equal(outputs, x_BT * jnp.repeat(entry_N, L)[None])
    np.testing.assert_array_equal(final_B, sums_BN.sum(axis=1))
    order = range(N)[::-1] if reverse else range(N)
    entered = {n: sums_BN[:, list(order)[:i]].sum(axis=1) for i, n in enumerate(order)}
    np.testing.assert_array_equal(entered_NB, [entered[n] for n in range(N)])


def test_chunks_there_and_back():
    x_BTHX = jnp.arange(2 * 7 * 3 * 5.0).reshape(2, 7, 3, 5)
    x_NBHCX = chunk_blocks.to_chunks(x_BTHX, 4, jnp.float16)
    assert x_NBHCX.shape == (2, 2, 3, 4, 5) and x_NBHCX.dtype == jnp.float16
    np.testing.assert_array_equal(x_NBHCX[1, 0, 2, 1], x_BTHX[0, 5, 2])
    back_BTHX = chunk_blocks.from_chunks(x_NBHCX)
    np.testing.assert_array_equal(back_BTHX[:, :7], x_BTHX)
    assert not back_BTHX[:, 7:].any()


T, H, K = 160, 2, 8
SHAPES = {"q": (1, T, H, K), "beta": (1, T, H), "x": (1, T, K), "matrix": (24, K)}
TAKES = {
    linear_attention: "qqq",
    delta_rule: ("q", "q", "q", "beta"),
    diagonal_plus_low_rank: "qqqqq",
    softmax_attention: "qqq",
    diagonal_scan: "xx",
    linear_cross_entropy: ("x", "matrix"),
}


@pytest.mark.parametrize("operator", TAKES, ids=lambda operator: operator.__name__)
def test_a_loop_writes_bfloat16_without_converting_the_whole(operator, monkeypatch):
    """Otherwise time grows with the square of the length: XLA's CPU backend narrows all of it."""
    monkeypatch.setattr(chunk_blocks, "CPU_STATE_ROWS", 16)
    keywords = {
        softmax_attention: {"implementation": "chunked"},
        linear_cross_entropy: {"labels_BT": jnp.zeros((1, T), jnp.int32), "chunk_size": 16},
    }.get(operator, {})

    def loss(*arrays):
        results = operator(*arrays, **keywords)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results))

    arrays = [jnp.ones(SHAPES[name], jnp.bfloat16) for name in TAKES[operator]]
    gradients = jax.grad(loss, tuple(range(len(arrays))))
    text = jax.jit(gradients).lower(*arrays).compile().as_text()
    assert "dynamic-update-slice(" in text  # so there is something to see
    assert not _converted_buffers(text)


def _converted_buffers(text):
    """Instructions that convert the result or the operand of a dynamic-update-slice."""
    opcode, found = {}, []
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%(\S+) = \S+ ([\w-]+)\(%?([\w.-]*)", line)
        if match is None:
            continue
        name, opcode[name], operand = match[1], match[2], match[3]
        pair = opcode[name], opcode.get(operand)
        if pair in (("convert", "dynamic-update-slice"), ("dynamic-update-slice", "convert")):
            found.append(line.strip())
    return found
