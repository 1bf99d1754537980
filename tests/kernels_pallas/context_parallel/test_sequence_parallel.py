"""Operators over a mesh axis against the definition on one device, in float64; and what the
compiled programs send."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kernels_pallas
from kernels_pallas import causal_conv, context_parallel, softmax_attention
from kernels_pallas.common import remat
from kernels_pallas.dispatch import devices as kernel_devices
from tests.kernels_pallas.ops import test_delta_rule, test_diagonal_scan, test_linear_attention
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    assert_close,
    cotangents_of,
    everything,
    inputs_of,
    truth,
)

TIME, SAME = PartitionSpec(None, "seq"), PartitionSpec()
CASES = {
    "linear_attention": test_linear_attention.CASE,
    "delta_rule": test_delta_rule.DELTA_RULE,
    "diagonal_plus_low_rank": test_delta_rule.DIAGONAL_PLUS_LOW_RANK,
    "diagonal_scan": test_diagonal_scan.CASE,
}
CASES["causal_conv"] = dataclasses.replace(
    CASES["diagonal_scan"], call=lambda *a, **k: _conv(*a, **k)
)
NAMES = {
    "linear_attention": ("q", "k", "v"),
    "delta_rule": ("q", "k", "v", "beta"),
    "diagonal_plus_low_rank": ("q", "k", "v", "a", "b"),
    "diagonal_scan": ("x",),
    "causal_conv": ("x", "w"),
}


def _mesh(W):
    return jax.make_mesh((W,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:W])


def _sharded(function, W, check_vma=False):
    """function(inputs, segment_ids) -> (output over time, final state), on W ranks; inputs split
    where they have time."""

    def call(inputs, *, implementation=None, segment_ids=None):
        T = segment_ids.shape[1]
        specs = {n: TIME if x.ndim > 1 and x.shape[1] == T else SAME for n, x in inputs.items()}
        return jax.shard_map(
            functools.partial(function, implementation=implementation),
            mesh=_mesh(W),
            in_specs=(specs, TIME),
            out_specs=(TIME, SAME),
            check_vma=check_vma,
        )(inputs, segment_ids)

    return call


@functools.cache
def _over_ranks(operator, W, collective, check_vma=False, **keywords):
    """The operator's case, on W ranks."""

    def function(inputs, segment_ids, implementation):
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in NAMES[operator]]
        if operator == "diagonal_scan" and "decay" in inputs:
            inputs["decay_BTD"] = inputs.pop("decay")
        if collective is not None:
            inputs["collective"] = collective
        return getattr(context_parallel, operator)(
            *first,
            **inputs,
            **keywords,
            segment_ids=segment_ids,
            axis_name="seq",
            implementation=implementation,
        )

    return dataclasses.replace(CASES[operator], call=_sharded(function, W, check_vma))


def _documents(T, kind):
    """whole: one document a row. packed: row 0 one that begins inside the second eighth and ends in
    the last but one, row 1 borders of all kinds: on eighths (which are ranks' borders), beside
    them, single tokens, none for long, ids that come back."""
    ids = np.ones((2, T), np.int32)
    if kind == "packed":
        L = T // 8
        ids[0, : L + L // 2] = 70_000
        ids[0, -L - 2 :] = -3
        starts = np.isin(np.arange(T), [1, L - 1, L, 2 * L, 2 * L + 1, 5 * L - 1, T - 1])
        ids[1] = np.cumsum(starts) % 3
    return ids


@functools.cache
def _expected(operator, shape, regime, kind):
    case = CASES[operator]
    inputs, ids = inputs_of(case, shape, regime), _documents(shape.T, kind)
    return inputs, ids, truth(case, inputs, ids)


def _check(operator, W, collective, regimes, T, implementation="chunked", **keywords):
    """Equal to one device, in one compiled program if the regimes have arrays of one shape."""
    shape = Shape(T=T, H=4, G=2) if CASES[operator].grouped else Shape(T=T)
    case = _over_ranks(operator, W, collective, **keywords)
    for regime in regimes:
        for kind in ("whole", "packed"):
            inputs, ids, expected = _expected(operator, shape, regime, kind)
            shapes = expected["output"], expected["final state"]
            got = everything(case, implementation, inputs, ids, cotangents_of(*shapes))
            assert_close(got, expected, TOLERANCE["float32"])


slow, exhaustive = pytest.mark.slow, [pytest.mark.slow, pytest.mark.exhaustive]
HEAD = ("per_token mixed", "per_token resets", "per_token strong", "per_token weak")
CHANNEL = ("per_channel mixed", "per_channel resets", "per_channel strong", "per_channel weak")
SIGNS = ("none", "one key, beta 2", "repeated keys, any beta")
EQUAL = [
    pytest.param("linear_attention", 8, "all_gather", HEAD, 504),
    pytest.param("linear_attention", 4, "all_scan", CHANNEL, 400, marks=slow),
    pytest.param("linear_attention", 2, "ring", ("none",), 200, marks=slow),
    pytest.param("linear_attention", 4, "all_gather", ("per_head",), 400, marks=exhaustive),
    pytest.param("delta_rule", 4, "all_gather", SIGNS, 400, marks=slow),
    pytest.param("delta_rule", 8, "all_scan", CHANNEL, 504, marks=exhaustive),
    pytest.param("delta_rule", 2, "ring", HEAD, 126, marks=exhaustive),
    pytest.param("diagonal_plus_low_rank", 4, "all_gather", CHANNEL, 400, marks=exhaustive),
    pytest.param("diagonal_scan", 4, "all_gather", ("log", "log resets", "log strong"), 400),
    pytest.param("diagonal_scan", 8, "ring", ("complex weak",), 504, marks=slow),
    pytest.param("diagonal_scan", 4, "all_scan", ("any sign", "weak"), 400, marks=exhaustive),
]


@pytest.mark.parametrize("operator, W, collective, regimes, T", EQUAL)
def test_equals_one_device(operator, W, collective, regimes, T):
    _check(operator, W, collective, regimes, T)


@pytest.mark.parametrize("collective", ["all_gather", "ring"])
def test_a_scan_grows_from_nothing(collective):
    """Decays of 3 for 100 tokens multiply to infinity; of zeros, as padding makes them, nothing
    grows."""
    x = np.zeros((2, 400, 3), np.float32)
    x[:, 390:] = 1
    decay = np.full(x.shape, 3, np.float32)
    decay[1, 200] = 0
    inputs = {"x": x, "decay": decay, "initial_state": np.zeros((2, 3), np.float32)}
    ids = _documents(400, "whole")
    got = everything(_over_ranks("diagonal_scan", 4, collective), None, inputs, ids)
    with jax.enable_x64(True):
        wide = {name: z.astype(np.float64) for name, z in inputs.items()}
        h, final = CASES["diagonal_scan"].call(wide, implementation="reference")
    assert_close(
        {name: got[name] for name in ("output", "final state")},
        {"output": np.asarray(h), "final state": np.asarray(final)},
        TOLERANCE["float32"],
    )


@pytest.mark.parametrize(
    "regime, collective",
    [
        ("log", "all_gather"),
        pytest.param("complex log resets", "all_scan", marks=exhaustive),
        pytest.param("any sign", "ring", marks=exhaustive),
    ],
)
@pytest.mark.slow
def test_reverse_scan(regime, collective):
    inputs = inputs_of(CASES["diagonal_scan"], Shape(T=200), regime)
    ids = _documents(200, "packed")
    one = dataclasses.replace(
        CASES["diagonal_scan"],
        call=lambda inputs, **keywords: CASES["diagonal_scan"].call(
            inputs, reverse=True, **keywords
        ),
    )
    got = everything(_over_ranks("diagonal_scan", 4, collective, reverse=True), None, inputs, ids)
    assert_close(got, truth(one, inputs, ids), TOLERANCE["float32"])


def _conv(inputs, *, implementation=None, segment_ids=None):
    inputs = dict(inputs)
    x, w = inputs.pop("x"), inputs.pop("w")
    return causal_conv(x, w, **inputs, segment_ids=segment_ids, implementation=implementation)


@pytest.mark.parametrize("width, T", [(4, 200), pytest.param(6, 16, marks=slow)])
def test_causal_conv(width, T):
    """The second: stretches of two tokens, so that the five before come from three ranks, or from
    before them all."""
    rng = np.random.default_rng(0)
    sizes = {"x": (2, T, 6), "w": (width, 6), "bias": (6,), "initial_state": (2, width - 1, 6)}
    inputs = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    for kind in ("whole", "packed"):
        ids = _documents(T, kind)
        got = everything(_over_ranks("causal_conv", 8, None), None, inputs, ids)
        assert_close(got, truth(CASES["causal_conv"], inputs, ids), TOLERANCE["float32"])


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
        ids = _documents(8, "packed")
        got = jax.jit(_over_ranks("causal_conv", 4, None, check_vma=True).call)(
            inputs, segment_ids=ids
        )
        for one, other in zip(got, _conv(inputs, segment_ids=ids)):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_convolution_of_width_one_needs_no_tokens_before():
    x, w = np.arange(32, dtype=np.float32).reshape(2, 8, 2), np.array([[2.0, -1.0]], np.float32)
    ids, nothing = _documents(8, "packed"), np.zeros((2, 0, 2), np.float32)
    inputs = {"x": x, "w": w, "initial_state": nothing}
    y, tail = jax.jit(_over_ranks("causal_conv", 2, None).call)(inputs, segment_ids=ids)
    np.testing.assert_array_equal(y, x * w)
    assert tail.shape == nothing.shape


def _attention(attend, inputs, **keywords):
    """As a recurrence, for the suite: a softmax layer has no state."""
    qkv = (inputs[name] for name in "qkv")
    return attend(*qkv, **keywords), jnp.zeros((1, 1))


@functools.cache
def _attention_cases(W, collective, **keywords):
    """On one device, and over W ranks."""

    def over_ranks(inputs, segment_ids, implementation):
        del implementation
        attend = functools.partial(
            context_parallel.softmax_attention, axis_name="seq", collective=collective
        )
        return _attention(attend, inputs, segment_ids=segment_ids, **keywords)

    one = dataclasses.replace(
        CASES["causal_conv"],
        call=lambda inputs, **others: _attention(softmax_attention, inputs, **others, **keywords),
    )
    return one, dataclasses.replace(one, call=_sharded(over_ranks, W))


@pytest.mark.parametrize(
    "W, collective, keywords, T",
    [
        pytest.param(4, "all_gather", {}, 252, marks=slow),
        (4, "ring", {}, 200),
        pytest.param(8, "ring", {}, 504, marks=exhaustive),
        pytest.param(4, "ring", {"causal": False, "scale": 0.3}, 100, marks=exhaustive),
        pytest.param(2, "all_gather", {"causal": False}, 126, marks=exhaustive),
        pytest.param(8, "all_gather", {"window": 40}, 504, marks=slow),
        pytest.param(8, "all_gather", {"window": 40}, 200, marks=exhaustive),
        pytest.param(4, "ring", {"window": 10, "causal": False}, 100, marks=exhaustive),
    ],
)
def test_softmax_attention(W, collective, keywords, T):
    """Stretches even and odd (zigzag and not), windows within the stretch before and beyond it."""
    rng = np.random.default_rng(0)
    sizes = {"q": (2, T, 4, 8), "k": (2, T, 2, 8), "v": (2, T, 2, 12)}
    inputs = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    one, over_ranks = _attention_cases(W, collective, **keywords)
    for kind in ("whole", "packed"):
        ids = _documents(T, kind)
        got = everything(over_ranks, None, inputs, ids)
        assert_close(got, truth(one, inputs, ids), TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("collective", ["ring", pytest.param("all_gather", marks=exhaustive)])
def test_softmax_attention_in_an_order_of_the_callers(collective):
    """The whole sequence lies in zigzag order, and positions say so; ids are one a document, given
    for both sides.
    """
    W, T = 4, 96
    rng = np.random.default_rng(0)
    qkv = [rng.standard_normal((2, T, 2, 8)).astype(np.float32) for _ in "qkv"]
    ids = np.broadcast_to(np.arange(T) // 40, (2, T)).astype(np.int32)
    order = context_parallel.zigzag_order(W, T)
    assert order[: T // W].tolist() == [*range(12), *range(84, 96)]
    position_BT = np.broadcast_to(order, (2, T)).astype(np.int32)

    def attend(q, k, v, segment_ids, position_BT):
        ids = {"segment_ids": segment_ids, "kv_segment_ids_BS": segment_ids}
        positions = {"q_positions_BT": position_BT, "kv_positions_BS": position_BT}
        return context_parallel.softmax_attention(
            q, k, v, **ids, **positions, axis_name="seq", collective=collective
        )

    over_ranks = jax.jit(
        jax.shard_map(attend, mesh=_mesh(W), in_specs=TIME, out_specs=TIME, check_vma=False)
    )
    o_BTHV = over_ranks(*(x[:, order] for x in (*qkv, ids)), position_BT)
    expected = softmax_attention(*qkv, segment_ids=ids)
    assert_close({"o": o_BTHV[:, np.argsort(order)]}, {"o": expected}, TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, W, collective, regime",
    [
        ("linear_attention", 4, "all_gather", "per_token weak"),
        pytest.param("linear_attention", 8, "all_scan", "per_channel mixed", marks=exhaustive),
        pytest.param("delta_rule", 4, "all_gather", "per_token weak", marks=exhaustive),
        pytest.param("diagonal_scan", 4, "all_gather", "log", marks=exhaustive),
    ],
)
def test_bfloat16(operator, W, collective, regime):
    case, T = CASES[operator], 200
    inputs = inputs_of(case, Shape(T=T), regime)
    inputs = {n: x.astype(jnp.bfloat16) if n in case.rounded else x for n, x in inputs.items()}
    ids = _documents(T, "packed")
    shapes = jax.eval_shape(lambda x: case.call(x, implementation="reference"), inputs)
    cotangents = tuple(
        c.astype(shape.dtype).astype(c.dtype) for c, shape in zip(cotangents_of(*shapes), shapes)
    )
    over_ranks = _over_ranks(operator, W, collective)
    got = everything(over_ranks, "chunked", inputs, ids, cotangents)
    assert_close(got, truth(case, inputs, ids, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, regime",
    [
        ("linear_attention", "per_token mixed"),
        pytest.param("diagonal_scan", "log", marks=exhaustive),
        pytest.param("linear_attention", "per_channel mixed", marks=exhaustive),
    ],
)
def test_kernels(operator, regime):
    """The Mosaic kernels, interpreted, on every rank."""
    with kernel_devices.interpreted():
        _check(operator, 2, "all_gather", (regime,), 64, implementation="pallas_tpu")


@pytest.mark.parametrize(
    "operator, regime",
    [
        ("linear_attention", "per_head"),
        pytest.param("delta_rule", "per_head", marks=exhaustive),
        pytest.param("diagonal_scan", "fixed", marks=exhaustive),
    ],
)
@pytest.mark.slow
def test_with_replication_checked(operator, regime):
    """Under check_vma, with a decay that is the same on all ranks."""
    _check(operator, 4, "all_gather", (regime,), 64, check_vma=True)


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
        over_ranks = jax.shard_map(local, mesh=_mesh(4), in_specs=specs, out_specs=TIME)
        got, within = jax.jit(over_ranks)(x, ids, first)
    assert got.dtype == within.dtype == dtype
    np.testing.assert_array_equal(got, moved)
    np.testing.assert_array_equal(within, np.where(begins, np.zeros_like(x), moved))


def test_associative_scan_of_64_bits():
    x = (np.arange(16).reshape(2, 8) + 1) * 10**12
    with jax.enable_x64(True):
        scan = functools.partial(context_parallel.associative_scan, jnp.add, axis_name="seq")
        over_ranks = jax.shard_map(scan, mesh=_mesh(4), in_specs=TIME, out_specs=TIME)
        got = jax.jit(over_ranks)(x)
    np.testing.assert_array_equal(got, np.cumsum(x, axis=1))


def test_ranks_over_two_mesh_axes():
    """axis_name as a tuple, of one axis or of two: the last one is the fastest."""
    mesh = jax.make_mesh((2, 2), ("slow", "fast"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    q = np.random.default_rng(0).standard_normal((1, 16, 1, 4)).astype(np.float32)
    ids = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 3, 3, 3, 3]])
    expected = kernels_pallas.linear_attention(q, q, q, segment_ids=ids)
    for axes, split in ((("slow", "fast"),) * 2, (("fast",), "fast")):
        time = PartitionSpec(None, split)

        def attend(q, ids, axes=axes):
            return context_parallel.linear_attention(
                q, q, q, segment_ids=ids, axis_name=axes, collective="all_scan"
            )

        over_ranks = jax.shard_map(attend, mesh=mesh, in_specs=time, out_specs=(time, SAME))
        got = jax.jit(over_ranks)(q, ids)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


RETURNING = np.array(
    [[1, 1, 2, 2, 1, 1, 3, 3], [1, 1, 1, 2, 1, 1, 1, 1], [4, 4, 4 + 2**32, 4 + 2**32, 4, 4, 4, 2]]
)


@pytest.mark.parametrize(
    "operator",
    ["linear_attention", "delta_rule", "diagonal_plus_low_rank", "diagonal_scan", "causal_conv"]
    + ["softmax_attention all_gather", "softmax_attention ring", "softmax_attention window"],
)
def test_an_id_that_comes_back_is_another_document(operator):
    """On the same rank, on another, at a border; positions given or not: as the plain operator,
    which cuts there.
    """
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((3, 8, *size)).astype(np.float32) for size in ((1, 4), (4,)))
    position = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))
    name, *how = operator.split()
    keywords = {"linear_attention": {}, "causal_conv": {"w": np.ones((4, 4), np.float32)}}.get(
        name, {}
    )
    more = {"ring": {"collective": "ring"}, "window": {"window": 6}}.get(how[0] if how else "", {})
    if name == "diagonal_scan":
        keywords = {"decay_BTD": np.full(4, 0.9, np.float32)}

    def call(module, q, x, ids, position, **axis):
        function = functools.partial(getattr(module, name), segment_ids=ids, **keywords, **axis)
        if name in ("diagonal_scan", "causal_conv"):
            return [function(x)[0]]
        if name == "softmax_attention":
            positions = {"q_positions_BT": position, "kv_positions_BS": position}
            window = {k: v for k, v in more.items() if k == "window"}
            sent = more if axis else window
            return [function(q, q, q, **sent), function(q, q, q, **sent, **positions)]
        others = {"delta_rule": [q[..., 0]], "diagonal_plus_low_rank": [q / 4, q / 4]}.get(name, [])
        return [function(q, q / 4, q, *others)[0]]

    with jax.enable_x64(True):
        inputs = q, x, RETURNING, position
        local = functools.partial(call, context_parallel, axis_name="seq")
        over_ranks = jax.shard_map(local, mesh=_mesh(4), in_specs=TIME, out_specs=TIME)
        got, expected = jax.jit(over_ranks)(*inputs), call(kernels_pallas, *inputs)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_associative_scan_and_shift():
    """An mLSTM's stabiliser, both ways, and what stood tokens before."""
    W, T = 8, 40
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, T, 3)).astype(np.float32) for _ in "ab")
    x, first = rng.integers(-(2**31), 2**31, (2, T)).astype(np.int32), np.array([[1] * 7, [2] * 7])
    ids = _documents(T, "packed")

    def compose(first, then):
        return first[0] + then[0], jnp.maximum(first[1] + then[0], then[1])

    def local(a, b, x, ids, first):
        scan = functools.partial(context_parallel.associative_scan, compose, axis_name="seq")
        shift = functools.partial(context_parallel.shift, axis_name="seq")
        moved = shift(x, 7, initial_state=first), shift(x, 7, initial_state=first, segment_ids=ids)
        return scan((a, b)), scan((a, b), reverse=True), moved

    over_ranks = jax.shard_map(
        local, mesh=_mesh(W), in_specs=(TIME,) * 4 + (SAME,), out_specs=TIME, check_vma=False
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


def _collectives(text, W):
    """Of a compiled program, forward and backward: kinds of collectives, and the bytes that come to
    a rank from others."""
    kinds, received = ([], []), np.zeros((2, W), int)
    sizes = {"f32": 4, "s32": 4, "bf16": 2}
    pattern = r"= (\w+)\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-permute)\("
    for line in text.splitlines():
        if (found := re.search(pattern, line)) is None:
            continue
        dtype, shape, kind = found.groups()
        size = sizes[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
        way = int("transpose(" in line)
        kinds[way].append(kind)
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs={{(.*?)}}", line).group(1)
            for pair in pairs.split("},{"):
                received[way, int(pair.split(",")[1])] += size
        else:
            received[way] += {"all-gather": size // W * (W - 1), "reduce-scatter": size * (W - 1)}[
                kind
            ]
    return kinds, received


def _compiled(operator, collective, W, T, packed, **sizes):
    """The program of a sequence's loss and gradients: no final state, no initial one."""
    shape = Shape(B=1, T=T, H=2, G=1, **sizes)
    regime = {"linear_attention": "per_token weak", "delta_rule": "none", "diagonal_scan": "log"}
    inputs = inputs_of(CASES[operator], shape, regime[operator])
    del inputs["initial_state"]
    case = _over_ranks(operator, W, collective)

    def loss(inputs, ids):
        ids = None if not packed else ids
        o, _ = case.call(inputs, implementation="reference", segment_ids=ids)
        return jnp.sum(o**2)

    return jax.jit(jax.grad(loss)).lower(inputs, _documents(T, "whole")[:1]).compile().as_text()


SENT = [
    ("linear_attention", "all_gather"),
    pytest.param("linear_attention", "all_scan", marks=slow),
    pytest.param("linear_attention", "ring", marks=slow),
    pytest.param("delta_rule", "all_gather", marks=slow),
    pytest.param("delta_rule", "all_scan", marks=exhaustive),
    pytest.param("diagonal_scan", "all_gather", marks=exhaustive),
]


@pytest.mark.parametrize("operator, collective", SENT)
def test_what_is_sent(operator, collective):
    """Collectives and bytes a rank in the compiled program, the same for sequences of any length."""
    W, B, H, K, V = 8, 1, 2, 8, 12
    programs = [_compiled(operator, collective, W, T, True, K=K, V=V) for T in (W * 2, W * 6)]
    kinds, received = _collectives(programs[0], W)
    again = _collectives(programs[1], W)
    assert kinds == again[0]
    np.testing.assert_array_equal(received, again[1])
    state = {"diagonal_scan": K}.get(operator, H * K * V)
    own = {"linear_attention": H, "delta_rule": H * K * K, "diagonal_scan": K}[operator]
    if collective == "all_gather":
        assert kinds == (["all-gather"], ["all-gather"])
        assert (received[0] == 4 * (W - 1) * B * (state + own + 8)).all()
        assert (received[1] == 4 * (W - 1) * B * (state + own)).all()
    else:
        N = 6 if collective == "all_scan" else 1
        assert kinds == (["collective-permute"] * (W + N - 2),) * 2
        assert received[0].tolist() == [0] + [4 * B * (state + 4 * N)] * (W - 1)
        assert received[1].tolist() == [4 * B * state] * (W - 1) + [0]


@pytest.mark.parametrize(
    "operator, collective, sent",
    [
        pytest.param("linear_attention", "all_gather", {"all_gather": 2}, marks=slow),
        pytest.param("delta_rule", "ring", {"collective_permute": 2 * 3}, marks=slow),
        ("diagonal_scan", "all_gather", {"all_gather": 2}),
        # A loop of one hop forward and of two backward, then home; two messages each to zigzag, to
        # zigzag once more, from it, and for the gradients of both. The documents' ids at stretches'
        # ends are gathered again.
        pytest.param(
            "softmax_attention",
            "ring",
            {"collective_permute": 1 + 3 + 5 * 2, "all_gather": 2},
            marks=slow,
        ),
    ],
)
def test_what_is_recomputed_is_not_sent_again(operator, collective, sent):
    """A backward pass that keeps the states that entered, or a ring's output, has as many
    collectives as one that keeps all."""
    sizes = {name: (1, 32, 2, 4) for name in "qkv"} | {"beta": (1, 32, 2), "x": (1, 32, 6)}
    names = NAMES | {"softmax_attention": "qkv", "diagonal_scan": "xx"}
    inputs = [jax.ShapeDtypeStruct(sizes[name], jnp.float32) for name in names[operator]]

    def call(ids, *inputs):
        results = getattr(context_parallel, operator)(
            *inputs,
            axis_name="seq",
            collective=collective,
            segment_ids=ids,
            implementation="chunked",
        )
        return results if operator == "softmax_attention" else results[0]

    over_ranks = jax.shard_map(call, mesh=_mesh(4), in_specs=TIME, out_specs=TIME, check_vma=False)
    name = remat.OPERATOR_RESIDUALS if operator == "softmax_attention" else remat.ENTERING_STATES
    policy = jax.checkpoint_policies.save_only_these_names(name)
    recomputed = jax.checkpoint(over_ranks, policy=policy)
    gradients = jax.grad(lambda inputs, ids: jnp.sum(jnp.sin(recomputed(ids, *inputs))))
    text = jax.jit(gradients).lower(inputs, _documents(32, "whole")[:1]).as_text()
    kinds = re.findall(r'stablehlo\.(all_gather|collective_permute)"?\(', text)
    assert collections.Counter(kinds) == sent


@pytest.mark.slow
def test_what_softmax_attention_sends():
    """Keys and values, once, and their gradients back; with a window the tokens before the stretch
    alone."""
    W, L, G, K, V = 8, 4, 1, 8, 12
    sizes = {"q": (1, W * L, 2, K), "k": (1, W * L, G, K), "v": (1, W * L, G, V)}
    qkv = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values()]

    def sent(**keywords):
        attend = functools.partial(
            context_parallel.softmax_attention, axis_name="seq", implementation="xla", **keywords
        )
        over_ranks = jax.shard_map(
            attend, mesh=_mesh(W), in_specs=TIME, out_specs=TIME, check_vma=False
        )
        loss = jax.grad(lambda *qkv: jnp.sum(over_ranks(*qkv) ** 2), argnums=(0, 1, 2))
        return _collectives(jax.jit(loss).lower(*qkv).compile().as_text(), W)

    kinds, received = sent(collective="all_gather")
    assert kinds == (["all-gather"], ["reduce-scatter"])
    assert (received == 4 * (W - 1) * L * G * (K + V)).all()
    kinds, received = sent(window=3)
    assert kinds == (["collective-permute"],) * 2
    tokens = 4 * 2 * G * (K + V)
    assert received.tolist() == [[0] + [tokens] * (W - 1), [tokens] * (W - 1) + [0]]


def test_errors():
    """All before anything is compiled, and each with what to do."""
    x = jnp.ones((1, 8, 2, 6))

    def call(operator=context_parallel.linear_attention, **keywords):
        keywords = {"axis_name": "seq"} | keywords
        function = jax.shard_map(
            lambda x: operator(x, x, x, **keywords)[0],
            mesh=_mesh(2),
            in_specs=TIME,
            out_specs=TIME,
            check_vma=False,
        )
        jax.eval_shape(function, x)

    with pytest.raises(ValueError, match="'allgather'; choose one of 'all_gather', 'all_scan', 'r"):
        call(collective="allgather")
    with pytest.raises(ValueError, match="'all_scan'; choose one of 'all_gather', 'ring'"):
        call(context_parallel.softmax_attention, collective="all_scan")
    with pytest.raises(ValueError, match=r"no mesh axis 'time' is mapped here \(mapped: seq\)"):
        call(axis_name="time")
    with pytest.raises(
        ValueError, match="no mesh axis 'seq' is mapped here .mapped: none.*shard_map"
    ):
        context_parallel.delta_rule(x, x, x, x[..., 0], axis_name="seq")
    with pytest.raises(
        ValueError, match=r"blocks is 4; it must divide the state's 6 columns: .*6\]"
    ):
        call(collective="all_scan", blocks=4)
    with pytest.raises(ValueError, match="blocks is for collective='all_scan'; this is 'ring'"):
        call(collective="ring", blocks=2)
    with pytest.raises(NotImplementedError, match="'xla' cannot run with collective='ring'"):
        call(context_parallel.softmax_attention, collective="ring", implementation="xla")
    with pytest.raises(
        ValueError, match="100 tokens do not divide .* 4 ranks: use a multiple of 8"
    ):
        context_parallel.zigzag_order(4, 100)
