"""Convolutions, shifts and associative scans over ranks: what reads the tokens before a shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import context_parallel
from tests.kernels_pallas.context_parallel import ranks
from tests.kernels_pallas.context_parallel.ranks import CASES, SAME, TIME, slow
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    assert_close,
    everything,
    truth,
)


@pytest.mark.parametrize("width, T", [(4, 200), pytest.param(6, 16, marks=slow)])
def test_causal_conv(width, T):
    """The second: shards of two tokens, so that the five before come from three ranks, or from
    before them all."""
    rng = np.random.default_rng(0)
    sizes = {"x": (2, T, 6), "w": (width, 6), "bias": (6,), "initial_state": (2, width - 1, 6)}
    inputs = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    for kind in ("whole", "packed"):
        ids = ranks.documents(T, kind)
        got = everything(ranks.over_ranks(context_parallel.causal_conv, 8), None, inputs, ids)
        assert_close(
            got, truth(CASES[context_parallel.causal_conv], inputs, ids), TOLERANCE["float32"]
        )


def test_a_convolution_keeps_imaginary_parts_over_ranks():
    """Of w, bias and what entered, where x is real; dtypes as the plain operator's."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 3)).astype(np.float32)
    w, bias, entered = (
        (rng.standard_normal(size) * (1 + 2j)).astype(np.complex64)
        for size in ((4, 3), (3,), (2, 3, 3))
    )
    for more in ({}, {"bias": bias}, {"initial_state": entered}):
        inputs = {"x": x, "w": np.real(w) if more else w, **more}
        ids = ranks.documents(8, "packed")
        got = jax.jit(ranks.over_ranks(context_parallel.causal_conv, 4, check_vma=True).call)(
            inputs, segment_ids=ids
        )
        for one, other in zip(got, ranks.conv(inputs, segment_ids=ids)):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_convolution_of_width_one_needs_no_tokens_before():
    x, w = np.arange(32, dtype=np.float32).reshape(2, 8, 2), np.array([[2.0, -1.0]], np.float32)
    ids, nothing = ranks.documents(8, "packed"), np.zeros((2, 0, 2), np.float32)
    inputs = {"x": x, "w": w, "initial_state": nothing}
    y, tail = jax.jit(ranks.over_ranks(context_parallel.causal_conv, 2).call)(
        inputs, segment_ids=ids
    )
    np.testing.assert_array_equal(y, x * w)
    assert tail.shape == nothing.shape


DTYPES = ("bool", "int4", "uint8", "int16", "uint32", "int64", "uint64") + (
    "float8_e5m2", "float16", "bfloat16", "float64", "complex64",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_gives_back_what_it_was_given(dtype):
    """Any dtype, every bit: with documents x travels beside ids of 64 bits, of which some differ
    above the 32nd.
    """
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    x = rng.integers(0, 2**63, (2, 8)).view(np.int64)
    if jnp.issubdtype(dtype, jnp.inexact):
        x = rng.standard_normal((2, 8)) + (
            1j * rng.standard_normal((2, 8)) if dtype.kind == "c" else 0
        )
    x, first = x.astype(dtype), np.ones((2, 1), dtype)
    ids = np.array([[5, 5, 5, 5, 5 + 2**32, 5 + 2**32, 5, 5], [7] * 3 + [1] * 5])
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    moved = np.concatenate([first, x[:, :-1]], axis=1)
    with jax.enable_x64(True):
        shift = functools.partial(context_parallel.shift, axis_name="seq")

        def local(x, ids, first):
            return shift(x, initial_state=first), shift(x, initial_state=first, segment_ids=ids)

        specs = (TIME, TIME, SAME)
        over_ranks = jax.shard_map(local, mesh=ranks.mesh(4), in_specs=specs, out_specs=TIME)
        got, within = jax.jit(over_ranks)(x, ids, first)
    assert got.dtype == within.dtype == dtype
    np.testing.assert_array_equal(got, moved)
    np.testing.assert_array_equal(within, np.where(begins, np.zeros_like(x), moved))


def test_associative_scan_of_64_bits():
    x = (np.arange(16).reshape(2, 8) + 1) * 10**12
    with jax.enable_x64(True):
        scan = functools.partial(context_parallel.associative_scan, jnp.add, axis_name="seq")
        over_ranks = jax.shard_map(scan, mesh=ranks.mesh(4), in_specs=TIME, out_specs=TIME)
        got = jax.jit(over_ranks)(x)
    np.testing.assert_array_equal(got, np.cumsum(x, axis=1))


def test_associative_scan_and_shift():
    """An mLSTM's stabiliser, both ways, and what stood tokens before."""
    W, T = 8, 40
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, T, 3)).astype(np.float32) for _ in "ab")
    x, first = rng.integers(-(2**31), 2**31, (2, T)).astype(np.int32), np.array([[1] * 7, [2] * 7])
    ids = ranks.documents(T, "packed")

    def compose(first, then):
        return first[0] + then[0], jnp.maximum(first[1] + then[0], then[1])

    def local(a, b, x, ids, first):
        scan = functools.partial(context_parallel.associative_scan, compose, axis_name="seq")
        shift = functools.partial(context_parallel.shift, axis_name="seq")
        moved = shift(x, 7, initial_state=first), shift(x, 7, initial_state=first, segment_ids=ids)
        return scan((a, b)), scan((a, b), reverse=True), moved

    over_ranks = jax.shard_map(
        local,
        mesh=ranks.mesh(W),
        in_specs=(TIME,) * 4 + (SAME,),
        out_specs=TIME,
        check_vma=False,
    )
    forward, backward, (moved, within) = jax.jit(over_ranks)(a, b, x, ids, first.astype(np.int32))
    for got, reverse in ((forward, False), (backward, True)):
        expected = jax.lax.associative_scan(compose, (a, b), axis=1, reverse=reverse)
        for one, other in zip(got, expected):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    expected = np.concatenate([first, x], axis=1)[:, :T]
    np.testing.assert_array_equal(moved, expected)
    run = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), axis=1)
    same = run == np.pad(run, ((0, 0), (7, 0)))[:, :T]
    np.testing.assert_array_equal(within, np.where(same, expected, 0))
