"""Operators over a mesh axis against the definition on one device, in float64; and what the compiled programs send."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import sequence_parallel, softmax_attention, targets
from tests.kernels_pallas import (
    test_causal_conv,
    test_delta_rule,
    test_diagonal_scan,
    test_linear_attention,
)
from tests.kernels_pallas.conformance import (
    TOLERANCE,
    OperatorCase,
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
    """function(inputs, segment_ids) -> (output over time, final state), on W ranks; inputs split where they have time."""

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
def _over_ranks(operator, W, exchange, check_vma=False, **keywords):
    """The operator's case, on W ranks."""

    def function(inputs, segment_ids, implementation):
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in NAMES[operator]]
        if operator == "diagonal_scan" and "decay" in inputs:
            inputs["decay_BTD"] = inputs.pop("decay")
        if exchange is not None:
            inputs["exchange"] = exchange
        return getattr(sequence_parallel, operator)(
            *first,
            **inputs,
            **keywords,
            segment_ids=segment_ids,
            axis_name="seq",
            implementation=implementation,
        )

    return dataclasses.replace(CASES[operator], call=_sharded(function, W, check_vma))


def _documents(T, kind):
    """whole: one document a row. packed: row 0 one that begins inside the second eighth and ends in the last but one, row 1
    borders of all kinds: on eighths (which are ranks' borders), beside them, single tokens, none for long, ids that come back."""
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


def _check(operator, W, exchange, regimes, T, implementation="chunked", **keywords):
    """Equal to one device, in one compiled program if the regimes have arrays of one shape."""
    shape = Shape(T=T, H=4, G=2) if CASES[operator].grouped else Shape(T=T)
    case = _over_ranks(operator, W, exchange, **keywords)
    for regime in regimes:
        for kind in ("whole", "packed"):
            inputs, ids, expected = _expected(operator, shape, regime, kind)
            shapes = expected["output"], expected["final state"]
            got = everything(case, implementation, inputs, ids, cotangents_of(*shapes))
            assert_close(got, expected, TOLERANCE["float32"])


slow, exhaustive = pytest.mark.slow, [pytest.mark.slow, pytest.mark.exhaustive]
HEAD = ("head mixed", "head resets", "head strong", "head weak")
CHANNEL = ("channel mixed", "channel resets", "channel strong", "channel weak")
SIGNS = ("none", "one key, beta 2", "repeated keys, any beta")
EQUAL = [
    pytest.param("linear_attention", 8, "all_gather", HEAD, 504),
    pytest.param("linear_attention", 4, "all_scan", CHANNEL, 400, marks=slow),
    pytest.param("linear_attention", 2, "ring", ("none",), 200, marks=slow),
    pytest.param("linear_attention", 4, "all_gather", ("fixed",), 400, marks=exhaustive),
    pytest.param("delta_rule", 4, "all_gather", SIGNS, 400, marks=slow),
    pytest.param("delta_rule", 8, "all_scan", CHANNEL, 504, marks=exhaustive),
    pytest.param("delta_rule", 2, "ring", HEAD, 126, marks=exhaustive),
    pytest.param("diagonal_plus_low_rank", 4, "all_gather", CHANNEL, 400, marks=exhaustive),
    pytest.param("diagonal_scan", 4, "all_gather", ("log", "log resets", "log strong"), 400),
    pytest.param("diagonal_scan", 8, "ring", ("complex weak",), 504, marks=slow),
    pytest.param("diagonal_scan", 4, "all_scan", ("any sign", "weak"), 400, marks=exhaustive),
]


@pytest.mark.parametrize("operator, W, exchange, regimes, T", EQUAL)
def test_equals_one_device(operator, W, exchange, regimes, T):
    _check(operator, W, exchange, regimes, T)
