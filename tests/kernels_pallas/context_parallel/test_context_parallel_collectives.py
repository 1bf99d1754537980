"""What compiled programs send between ranks: which collectives, and how many bytes."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import remat
from kernels_pallas.context_parallel import (
    delta_rule,
    diagonal_scan,
    document_sums,
    linear_attention,
    softmax_attention,
)
from kernels_pallas.tools import hlo
from tests.kernels_pallas.context_parallel import ranks
from tests.kernels_pallas.context_parallel.ranks import CASES, NAMES, TIME, exhaustive, slow
from tests.kernels_pallas.ops.conformance import Shape, inputs_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def _sent(text, W):
    """Returns a program's kinds of collectives, and the bytes that come to each rank from others.

    Each is of the forward and of the backward pass.
    """
    kinds, received = ([], []), np.zeros((2, W), int)
    for visit in hlo.HloModule(text).visits():
        kind = visit.instruction.operation
        if kind not in KINDS:
            continue
        way = int("transpose(" in visit.instruction.attributes)
        size = sum(array.bytes for array in visit.instruction.arrays)
        kinds[way].append(kind)
        if kind == "collective-permute":
            for _, target in hlo.groups(visit.instruction, W):
                received[way, target] += size
        else:
            share = {"all-gather": size // W * (W - 1), "reduce-scatter": size * (W - 1)}
            received[way] += {**share, "all-reduce": size}[kind]  # of an all-reduce, the sum
    return kinds, received


def _compiled(operator, collective, W, T, **sizes):
    """Compiles the loss and gradients of a packed sequence: no final state, no initial one."""
    regime = {linear_attention: "per_token weak", delta_rule: "none", diagonal_scan: "log"}
    shape = Shape(B=1, T=T, H=2, G=1, **sizes)
    inputs = inputs_of(CASES[operator], shape, regime[operator])
    del inputs["initial_state"]
    case = ranks.over_ranks(operator, W, collective)

    def loss(inputs, ids):
        o, _ = case.call(inputs, implementation="reference", segment_ids=ids)
        return jnp.sum(o**2)

    ids = ranks.documents(T, "whole")[:1]
    return jax.jit(jax.grad(loss)).lower(inputs, ids).compile().as_text()


SENT = [
    (linear_attention, "all_gather"),
    pytest.param(linear_attention, "all_scan", marks=slow),
    pytest.param(linear_attention, "ring", marks=slow),
    pytest.param(delta_rule, "all_gather", marks=slow),
    pytest.param(delta_rule, "all_scan", marks=exhaustive),
    pytest.param(diagonal_scan, "all_gather", marks=exhaustive),
]


@pytest.mark.parametrize("operator, collective", SENT)
def test_what_is_sent(operator, collective):
    """Collectives and bytes per rank do not depend on the sequence's length."""
    W, B, H, K, V = 8, 1, 2, 8, 12
    programs = [_compiled(operator, collective, W, T, K=K, V=V) for T in (W * 2, W * 6)]
    kinds, received = _sent(programs[0], W)
    again = _sent(programs[1], W)
    assert kinds == again[0]
    np.testing.assert_array_equal(received, again[1])
    state = K if operator is diagonal_scan else H * K * V
    own = {linear_attention: H, delta_rule: H * K * K, diagonal_scan: K}[operator]
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
    "packed, block_size, directions, more",
    [
        (False, None, 0, 0),
        (False, 4, 1, 0),
        pytest.param(False, 5, 2, 0, marks=slow),
        (True, None, 2, 0),
        pytest.param(True, 5, 2, 1, marks=slow),
    ],
)
def test_what_document_sums_sends(packed, block_size, directions, more):
    """Whole rows: one all-reduce of the state each way, the final state included. Blocks that end
    with the shard: one all-gather each way; documents, or blocks over borders: two."""
    W, B, T, H, K, V = 8, 1, 32, 2, 8, 12
    shape = Shape(B=B, T=T, H=H, G=1, K=K, V=V)
    inputs = inputs_of(CASES[document_sums], shape, "whole")
    del inputs["initial_state"]
    ids = ranks.documents(T, "packed")[:1] if packed else None

    def call(inputs, ids):
        how = {"axis_name": "seq", "segment_ids": ids, "block_size": block_size}
        o, final = document_sums(*inputs.values(), **how, implementation="reference")
        return o, final if directions == 0 else jnp.zeros(())

    over_ranks = jax.shard_map(
        call, mesh=ranks.mesh(W), in_specs=TIME, out_specs=(TIME, ranks.SAME), check_vma=False
    )

    def loss(inputs, ids):
        o, final = over_ranks(inputs, ids)
        return jnp.sum(o**2) + jnp.sum(final**2)

    text = jax.jit(jax.grad(loss)).lower(inputs, ids).compile().as_text()
    kinds, received = _sent(text, W)
    if directions == 0:
        assert kinds == (["all-reduce"], ["all-reduce"])
        assert (received == 4 * B * H * K * V).all()
        return
    state, numbers = directions * (H * K * V + 1), 8 if packed else 0
    borders = numbers + 8 if block_size == 5 and not packed else directions * numbers
    assert kinds == (["all-gather"] * (directions + more), ["all-gather"] * directions)
    assert (received[0] == 4 * (W - 1) * B * (state + borders + 13 * more)).all()
    assert (received[1] == 4 * (W - 1) * B * state).all()


@pytest.mark.parametrize(
    "operator, collective, sent",
    [
        pytest.param(linear_attention, "all_gather", {"all_gather": 2}, marks=slow),
        pytest.param(delta_rule, "ring", {"collective_permute": 2 * 3}, marks=slow),
        (diagonal_scan, "all_gather", {"all_gather": 2}),
        pytest.param(document_sums, "ring", {"collective_permute": 4 * 3}, marks=slow),
        # A loop of one hop forward and of two backward, then home; two messages each to zigzag, to
        # zigzag once more, from it, and for the gradients of both. The documents' ids at the ends
        # of shards are gathered again.
        pytest.param(
            softmax_attention,
            "ring",
            {"collective_permute": 1 + 3 + 5 * 2, "all_gather": 2},
            marks=slow,
        ),
    ],
)
def test_what_is_recomputed_is_not_sent_again(operator, collective, sent):
    """A backward pass that keeps the entering states, or a ring's output, has as many collectives
    as one that keeps all."""
    sizes = {name: (1, 32, 2, 4) for name in "qkv"} | {"beta": (1, 32, 2), "x": (1, 32, 6)}
    names = NAMES | {softmax_attention: "qkv", diagonal_scan: "xx"}
    inputs = [jax.ShapeDtypeStruct(sizes[name], jnp.float32) for name in names[operator]]

    def call(ids, *inputs):
        how = {"collective": collective, "segment_ids": ids, "implementation": "chunked"}
        results = operator(*inputs, axis_name="seq", **how)
        return results if operator is softmax_attention else results[0]

    mesh = ranks.mesh(4)
    over_ranks = jax.shard_map(call, mesh=mesh, in_specs=TIME, out_specs=TIME, check_vma=False)
    name = remat.OPERATOR_RESIDUALS if operator is softmax_attention else remat.ENTERING_STATES
    policy = jax.checkpoint_policies.save_only_these_names(name)
    recomputed = jax.checkpoint(over_ranks, policy=policy)
    gradients = jax.grad(lambda inputs, ids: jnp.sum(jnp.sin(recomputed(ids, *inputs))))
    ids = ranks.documents(32, "whole")[:1]
    text = jax.jit(gradients).lower(inputs, ids).as_text()
    kinds = re.findall(r'stablehlo\.(all_gather|collective_permute)"?\(', text)
    assert collections.Counter(kinds) == sent


@pytest.mark.slow
def test_what_softmax_attention_sends():
    """Keys and values, once, and their gradients back; with a window the tokens before the shard
    alone."""
    W, L, G, K, V = 8, 4, 1, 8, 12
    sizes = {"q": (1, W * L, 2, K), "k": (1, W * L, G, K), "v": (1, W * L, G, V)}
    qkv = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes.values()]

    def sent(**keywords):
        attend = functools.partial(
            softmax_attention, axis_name="seq", implementation="xla", **keywords
        )
        over_ranks = jax.shard_map(
            attend, mesh=ranks.mesh(W), in_specs=TIME, out_specs=TIME, check_vma=False
        )
        loss = jax.grad(lambda *qkv: jnp.sum(over_ranks(*qkv) ** 2), argnums=(0, 1, 2))
        return _sent(jax.jit(loss).lower(*qkv).compile().as_text(), W)

    kinds, received = sent(collective="all_gather")
    assert kinds == (["all-gather"], ["reduce-scatter"])
    assert (received == 4 * (W - 1) * L * G * (K + V)).all()
    kinds, received = sent(window=3)
    assert kinds == (["collective-permute"],) * 2
    tokens = 4 * 2 * G * (K + V)
    assert received.tolist() == [[0] + [tokens] * (W - 1), [tokens] * (W - 1) + [0]]
