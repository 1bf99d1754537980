"""Operators on simulated ranks: the conformance suite's cases with time split over a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import causal_conv, context_parallel
from tests.kernels_pallas.ops import (
    test_delta_rule,
    test_diagonal_scan,
    test_document_sums,
    test_linear_attention,
)
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    assert_close,
    at,
    cotangents_of,
    everything,
    inputs_of,
    truth,
)

TIME, SAME = PartitionSpec(None, "seq"), PartitionSpec()
slow, exhaustive = pytest.mark.slow, [pytest.mark.slow, pytest.mark.exhaustive]


def conv(inputs, *, implementation=None, segment_ids=None):
    """`causal_conv`, called as the suite calls an operator."""
    inputs = dict(inputs)
    x, w = inputs.pop("x"), inputs.pop("w")
    return causal_conv(x, w, **inputs, segment_ids=segment_ids, implementation=implementation)


# Of each operator: the plain one's case, and its positional arguments.
CASES = {
    context_parallel.linear_attention: test_linear_attention.CASE,
    context_parallel.delta_rule: test_delta_rule.DELTA_RULE,
    context_parallel.diagonal_plus_low_rank: test_delta_rule.DIAGONAL_PLUS_LOW_RANK,
    context_parallel.diagonal_scan: test_diagonal_scan.CASE,
    context_parallel.document_sums: test_document_sums.CASE,
    context_parallel.causal_conv: dataclasses.replace(test_diagonal_scan.CASE, call=conv),
}
NAMES = {
    context_parallel.linear_attention: ("q", "k", "v"),
    context_parallel.delta_rule: ("q", "k", "v", "beta"),
    context_parallel.diagonal_plus_low_rank: ("q", "k", "v", "a", "b"),
    context_parallel.diagonal_scan: ("x",),
    context_parallel.document_sums: ("q", "k", "v"),
    context_parallel.causal_conv: ("x", "w"),
}


def mesh(W):
    return jax.make_mesh((W,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:W])


def sharded(function, W, check_vma=False):
    """Returns function(inputs, segment_ids) -> (output over time, final state), on W ranks.

    Inputs that have time are split.
    """

    def call(inputs, *, implementation=None, segment_ids=None):
        T = segment_ids.shape[1]
        specs = {n: TIME if x.ndim > 1 and x.shape[1] == T else SAME for n, x in inputs.items()}
        return jax.shard_map(
            functools.partial(function, implementation=implementation),
            mesh=mesh(W),
            in_specs=(specs, TIME),
            out_specs=(TIME, SAME),
            check_vma=check_vma,
        )(inputs, segment_ids)

    return call


@functools.cache
def over_ranks(operator, W, collective=None, check_vma=False, **keywords):
    """Returns the operator's case, on W ranks."""
    if collective is not None:
        keywords["collective"] = collective

    def function(inputs, segment_ids, implementation):
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in NAMES[operator]]
        if operator is context_parallel.diagonal_scan and "decay" in inputs:
            inputs["decay_BTD"] = inputs.pop("decay")
        return operator(
            *first,
            **inputs,
            **keywords,
            segment_ids=segment_ids,
            axis_name="seq",
            implementation=implementation,
        )

    return dataclasses.replace(CASES[operator], call=sharded(function, W, check_vma))


def documents(T, kind):
    """Returns ids of two rows: of one document each ("whole"), or "packed".

    Packed, row 0 has a document from inside the second eighth to the last but one; row 1 has
    borders of all kinds: on eighths (ranks' borders), beside them, single tokens, none for long,
    ids that come back.
    """
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
    inputs, ids = inputs_of(case, shape, regime), documents(shape.T, kind)
    return inputs, ids, truth(at(case, regime), inputs, ids)


def check(operator, W, collective, regimes, T, implementation="chunked", **keywords):
    """Compares with one device, in one compiled program if the regimes have arrays of one shape."""
    shape = Shape(T=T, H=4, G=2) if CASES[operator].grouped else Shape(T=T)
    for regime in regimes:
        options = CASES[operator].operator.case.options(regime, shape)
        case = over_ranks(operator, W, collective, **options, **keywords)
        for kind in ("whole", "packed"):
            inputs, ids, expected = _expected(operator, shape, regime, kind)
            shapes = expected["output"], expected["final state"]
            got = everything(case, implementation, inputs, ids, cotangents_of(*shapes))
            assert_close(got, expected, TOLERANCE["float32"])
