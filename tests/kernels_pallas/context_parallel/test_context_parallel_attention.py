"""Softmax attention over ranks against one device: gathered, in a ring, in a window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import context_parallel, softmax_attention
from tests.kernels_pallas.context_parallel import ranks
from tests.kernels_pallas.context_parallel.ranks import CASES, TIME, exhaustive, slow
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    assert_close,
    everything,
    truth,
)


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
        CASES[context_parallel.causal_conv],
        call=lambda inputs, **others: _attention(softmax_attention, inputs, **others, **keywords),
    )
    return one, dataclasses.replace(one, call=ranks.sharded(over_ranks, W))


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
    """Shards even and odd (zigzag and not), windows within the shard before and beyond it."""
    rng = np.random.default_rng(0)
    sizes = {"q": (2, T, 4, 8), "k": (2, T, 2, 8), "v": (2, T, 2, 12)}
    inputs = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    one, over_ranks = _attention_cases(W, collective, **keywords)
    for kind in ("whole", "packed"):
        ids = ranks.documents(T, kind)
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
        jax.shard_map(attend, mesh=ranks.mesh(W), in_specs=TIME, out_specs=TIME, check_vma=False)
    )
    o_BTHV = over_ranks(*(x[:, order] for x in (*qkv, ids)), position_BT)
    expected = softmax_attention(*qkv, segment_ids=ids)
    assert_close({"o": o_BTHV[:, np.argsort(order)]}, {"o": expected}, TOLERANCE["float32"])
