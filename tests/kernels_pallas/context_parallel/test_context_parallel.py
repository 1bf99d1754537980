"""Operators over a mesh axis against the definition on one device, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kernels_pallas
from kernels_pallas.context_parallel import (
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    diagonal_scan,
    document_sums,
    linear_attention,
    softmax_attention,
    zigzag_order,
)
from kernels_pallas.dispatch import devices as kernel_devices
from tests.kernels_pallas.context_parallel import ranks
from tests.kernels_pallas.context_parallel.ranks import CASES, SAME, TIME, exhaustive, slow
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    assert_close,
    cotangents_of,
    everything,
    inputs_of,
    truth,
)

HEAD = ("per_token mixed", "per_token resets", "per_token strong", "per_token weak")
CHANNEL = ("per_channel mixed", "per_channel resets", "per_channel strong", "per_channel weak")
SIGNS = ("none", "one key, beta 2", "repeated keys, any beta")
EQUAL = [
    pytest.param(linear_attention, 8, "all_gather", HEAD, 504),
    pytest.param(linear_attention, 4, "all_scan", CHANNEL, 400, marks=slow),
    pytest.param(linear_attention, 2, "ring", ("none",), 200, marks=slow),
    pytest.param(linear_attention, 4, "all_gather", ("per_head",), 400, marks=exhaustive),
    pytest.param(delta_rule, 4, "all_gather", SIGNS, 400, marks=slow),
    pytest.param(delta_rule, 8, "all_scan", CHANNEL, 504, marks=exhaustive),
    pytest.param(delta_rule, 2, "ring", HEAD, 126, marks=exhaustive),
    pytest.param(diagonal_plus_low_rank, 4, "all_gather", CHANNEL, 400, marks=exhaustive),
    pytest.param(diagonal_scan, 4, "all_gather", ("log", "log resets", "log strong"), 400),
    pytest.param(diagonal_scan, 8, "ring", ("complex weak",), 504, marks=slow),
    pytest.param(diagonal_scan, 4, "all_scan", ("any sign", "weak"), 400, marks=exhaustive),
    pytest.param(document_sums, 8, "all_gather", ("blocks of 7",), 120),
    pytest.param(document_sums, 8, "all_gather", ("whole",), 120, marks=slow),
    pytest.param(document_sums, 4, "all_scan", ("whole", "blocks of 32"), 120, marks=slow),
    pytest.param(document_sums, 2, "ring", ("blocks of 7",), 126, marks=exhaustive),
]


@pytest.mark.parametrize("operator, W, collective, regimes, T", EQUAL)
def test_equals_one_device(operator, W, collective, regimes, T):
    ranks.check(operator, W, collective, regimes, T)


@pytest.mark.parametrize(
    "block_size", [None, 11, *(pytest.param(n, marks=slow) for n in (3, 8, 40))]
)
def test_document_sums_of_rows(block_size):
    """Rows of one document, without ids: whole; blocks that shards end with, or do not; blocks
    longer than a shard, and than the row.
    """
    case, T, W = CASES[document_sums], 32, 4
    inputs = inputs_of(case, Shape(T=T, H=4, G=2), "whole")
    keywords = {"block_size": block_size}
    one = dataclasses.replace(case, call=functools.partial(case.call, **keywords))
    expected = truth(one, inputs)
    check_vma = block_size in (None, 11)

    def over_ranks(inputs, *, implementation=None, segment_ids=None):
        specs = {name: SAME if name == "initial_state" else TIME for name in inputs}

        def call(inputs):
            q, k, v = (inputs[name] for name in "qkv")
            how = {"initial_state": inputs["initial_state"], "axis_name": "seq", **keywords}
            return document_sums(q, k, v, implementation=implementation, **how)

        return jax.shard_map(
            call,
            mesh=ranks.mesh(W),
            in_specs=(specs,),
            out_specs=(TIME, SAME),
            check_vma=check_vma,
        )(inputs)

    cotangents = cotangents_of(expected["output"], expected["final state"])
    over_ranks = dataclasses.replace(case, call=over_ranks)
    got = everything(over_ranks, "chunked", inputs, None, cotangents)
    assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("collective", ["all_gather", "ring"])
def test_a_scan_grows_from_nothing(collective):
    """Decays of 3 for 100 tokens multiply to infinity; of zeros, as padding makes them, nothing
    grows."""
    x = np.zeros((2, 400, 3), np.float32)
    x[:, 390:] = 1
    decay = np.full(x.shape, 3, np.float32)
    decay[1, 200] = 0
    inputs = {"x": x, "decay": decay, "initial_state": np.zeros((2, 3), np.float32)}
    ids = ranks.documents(400, "whole")
    got = everything(ranks.over_ranks(diagonal_scan, 4, collective), None, inputs, ids)
    with jax.enable_x64(True):
        wide = {name: z.astype(np.float64) for name, z in inputs.items()}
        h, final = CASES[diagonal_scan].call(wide, implementation="reference")
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
    case = CASES[diagonal_scan]
    inputs, ids = inputs_of(case, Shape(T=200), regime), ranks.documents(200, "packed")
    one = dataclasses.replace(case, call=functools.partial(case.call, reverse=True))
    over_ranks = ranks.over_ranks(diagonal_scan, 4, collective, reverse=True)
    got = everything(over_ranks, None, inputs, ids)
    assert_close(got, truth(one, inputs, ids), TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, W, collective, regime",
    [
        (linear_attention, 4, "all_gather", "per_token weak"),
        pytest.param(linear_attention, 8, "all_scan", "per_channel mixed", marks=exhaustive),
        pytest.param(delta_rule, 4, "all_gather", "per_token weak", marks=exhaustive),
        pytest.param(diagonal_scan, 4, "all_gather", "log", marks=exhaustive),
    ],
)
def test_bfloat16(operator, W, collective, regime):
    case, T = CASES[operator], 200
    inputs = inputs_of(case, Shape(T=T), regime)
    inputs = {n: x.astype(jnp.bfloat16) if n in case.rounded else x for n, x in inputs.items()}
    ids = ranks.documents(T, "packed")
    shapes = jax.eval_shape(lambda x: case.call(x, implementation="reference"), inputs)
    cotangents = tuple(
        c.astype(shape.dtype).astype(c.dtype) for c, shape in zip(cotangents_of(*shapes), shapes)
    )
    over_ranks = ranks.over_ranks(operator, W, collective)
    got = everything(over_ranks, "chunked", inputs, ids, cotangents)
    assert_close(got, truth(case, inputs, ids, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator, regime",
    [
        (linear_attention, "per_token mixed"),
        pytest.param(diagonal_scan, "log", marks=exhaustive),
        pytest.param(linear_attention, "per_channel mixed", marks=exhaustive),
    ],
)
def test_kernels(operator, regime):
    """The Mosaic kernels, interpreted, on every rank."""
    with kernel_devices.interpreted():
        ranks.check(operator, 2, "all_gather", (regime,), 64, implementation="pallas_tpu")


@pytest.mark.parametrize(
    "operator, regime",
    [
        (linear_attention, "per_head"),
        (document_sums, "blocks of 7"),
        pytest.param(delta_rule, "per_head", marks=exhaustive),
        pytest.param(diagonal_scan, "fixed", marks=exhaustive),
    ],
)
@pytest.mark.slow
def test_with_replication_checked(operator, regime):
    """Under check_vma, with a decay that is the same on all ranks."""
    ranks.check(operator, 4, "all_gather", (regime,), 64, check_vma=True)


def test_ranks_over_two_mesh_axes():
    """axis_name as a tuple, of one axis or of two: the last one is the fastest."""
    mesh = jax.make_mesh((2, 2), ("slow", "fast"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    q = np.random.default_rng(0).standard_normal((1, 16, 1, 4)).astype(np.float32)
    ids = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 3, 3, 3, 3]])
    expected = kernels_pallas.linear_attention(q, q, q, segment_ids=ids)
    for axes, split in ((("slow", "fast"),) * 2, (("fast",), "fast")):
        time = PartitionSpec(None, split)

        def attend(q, ids, axes=axes):
            return linear_attention(q, q, q, segment_ids=ids, axis_name=axes, collective="all_scan")

        over_ranks = jax.shard_map(attend, mesh=mesh, in_specs=time, out_specs=(time, SAME))
        got = jax.jit(over_ranks)(q, ids)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


RETURNING = np.array(
    [[1, 1, 2, 2, 1, 1, 3, 3], [1, 1, 1, 2, 1, 1, 1, 1], [4, 4, 4 + 2**32, 4 + 2**32, 4, 4, 4, 2]]
)


@pytest.mark.parametrize(
    "plain, operator, keywords",
    [
        (kernels_pallas.linear_attention, linear_attention, {}),
        (kernels_pallas.delta_rule, delta_rule, {}),
        (kernels_pallas.diagonal_plus_low_rank, diagonal_plus_low_rank, {}),
        (kernels_pallas.diagonal_scan, diagonal_scan, {}),
        (kernels_pallas.document_sums, document_sums, {}),
        (kernels_pallas.document_sums, document_sums, {"block_size": 2}),
        (kernels_pallas.causal_conv, causal_conv, {}),
        (kernels_pallas.softmax_attention, softmax_attention, {"collective": "all_gather"}),
        (kernels_pallas.softmax_attention, softmax_attention, {"collective": "ring"}),
        (kernels_pallas.softmax_attention, softmax_attention, {"window": 6}),
    ],
)
def test_an_id_that_comes_back_is_another_document(plain, operator, keywords):
    """On the same rank, on another, at a border; positions given or not: as the plain operator cuts
    there.
    """
    rng = np.random.default_rng(0)
    q, x = (rng.standard_normal((3, 8, *size)).astype(np.float32) for size in ((1, 4), (4,)))
    position = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))

    def call(function, q, x, ids, position):
        function = functools.partial(function, segment_ids=ids)
        if plain is kernels_pallas.diagonal_scan:
            return [function(x, np.full(4, 0.9, np.float32))[0]]
        if plain is kernels_pallas.causal_conv:
            return [function(x, np.ones((4, 4), np.float32))[0]]
        if plain is kernels_pallas.softmax_attention:
            positions = {"q_positions_BT": position, "kv_positions_BS": position}
            return [function(q, q, q), function(q, q, q, **positions)]
        others = {delta_rule: [q[..., 0]], diagonal_plus_low_rank: [q / 4, q / 4]}
        return [function(q, q / 4, q, *others.get(operator, []))[0]]

    local = functools.partial(call, functools.partial(operator, axis_name="seq", **keywords))
    window = {n: value for n, value in keywords.items() if n in ("window", "block_size")}
    with jax.enable_x64(True):
        inputs = q, x, RETURNING, position
        over_ranks = jax.shard_map(local, mesh=ranks.mesh(4), in_specs=TIME, out_specs=TIME)
        got = jax.jit(over_ranks)(*inputs)
        expected = call(functools.partial(plain, **window), *inputs)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_errors():
    """All before anything is compiled, and each with what to do."""
    x = jnp.ones((1, 8, 2, 6))

    def call(operator=linear_attention, **keywords):
        keywords = {"axis_name": "seq"} | keywords
        function = jax.shard_map(
            lambda x: operator(x, x, x, **keywords)[0],
            mesh=ranks.mesh(2),
            in_specs=TIME,
            out_specs=TIME,
            check_vma=False,
        )
        jax.eval_shape(function, x)

    with pytest.raises(ValueError, match="'allgather'; choose one of 'all_gather', 'all_scan', 'r"):
        call(collective="allgather")
    with pytest.raises(ValueError, match="'all_scan'; choose one of 'all_gather', 'ring'"):
        call(softmax_attention, collective="all_scan")
    with pytest.raises(ValueError, match=r"no mesh axis 'time' is mapped here \(mapped: seq\)"):
        call(axis_name="time")
    with pytest.raises(
        ValueError, match="no mesh axis 'seq' is mapped here .mapped: none.*shard_map"
    ):
        delta_rule(x, x, x, x[..., 0], axis_name="seq")
    with pytest.raises(
        ValueError, match=r"blocks is 4; it must divide the state's 6 columns: .*6\]"
    ):
        call(collective="all_scan", blocks=4)
    with pytest.raises(ValueError, match="blocks is for collective='all_scan'; this is 'ring'"):
        call(collective="ring", blocks=2)
    with pytest.raises(NotImplementedError, match="'xla' cannot run with collective='ring'"):
        call(softmax_attention, collective="ring", implementation="xla")
    with pytest.raises(
        ValueError, match="100 tokens do not divide .* 4 ranks: use a multiple of 8"
    ):
        zigzag_order(4, 100)
