"""The delta rule as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads; the steps of a sequence follow one another, and the heads'
states stay in VMEM between them. All of a chunk's algebra is inside the step (`per_token.py`,
`per_channel.py`), so that HBM sees the inputs once and the outputs once. The backward pass takes
the chunks in reverse, each from the state that enters it, and computes all else again.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.common import decay
from kernels_pallas.ops.delta_rule import chunked
from kernels_pallas.ops.delta_rule.tpu import per_channel, per_token
from kernels_pallas.ops.delta_rule.tpu.tiling import Tiling, tiling_of, unsupported_reason
from kernels_pallas.tpu import primitives, vjp
from kernels_pallas.tpu import tiling as tpu_tiling

__all__ = ["run", "unsupported_reason"]


def run(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, scale,
    chunk_size=None,
):  # fmt: skip
    """Computes the delta rule by the TPU kernels, for arguments normalised by `api.py`. Returns o
    (B, T, H, V) and the final state (B, H, K, V)."""
    tiling = tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale)
    g_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, jnp.float32, tiling.H)
    q, k, v, state = vjp.flat_inputs(tiling, q_BTGK, k_BTGK, v_BTHV, initial_state_BHKV)
    g, gates = None, [beta_BTH]
    if tiling.per_channel:
        g = vjp.flatten(g_BTHK, tiling, tiling.K, jnp.float32)
    elif tiling.decay == "per_token":
        gates.append(g_BTHK[..., 0])
    o, final_BHKV = _run(tiling, None, q, k, v, _gate_rows(gates, tiling), g, state)
    return vjp.outputs(tiling, o, final_BHKV, v_BTHV, q_BTGK.shape[3])


def _gate_rows(gates, tiling):
    """Arranges gates, arrays (B, T, H) of beta and perhaps log decay, with tokens along the lanes.
    Returns (B, grid steps per chunk, chunks, gates * heads of a step, C)."""

    def one(x_BTH):
        x = vjp.pad_tokens(x_BTH.astype(jnp.float32), tiling)
        x = x.reshape(tiling.B, tiling.chunks, tiling.C, tiling.groups, tiling.heads)
        return x.transpose(0, 3, 1, 4, 2)

    return jnp.concatenate([one(x) for x in gates], axis=3)


def _plain(tiling, _, q, k, v, gates, g, S_BHKV):
    B, T, H = *v.shape[:2], tiling.H
    rows = gates.reshape(B, tiling.groups, tiling.chunks, -1, tiling.heads, tiling.C)
    beta_BTH, *log_decay = rows.transpose(3, 0, 2, 5, 1, 4).reshape(-1, B, T, H)
    log_decay_BTHK = log_decay[0][..., None] if log_decay else None
    if g is not None:
        log_decay_BTHK = g.reshape(B, T, H, tiling.K)
    q, k, v = vjp.apart(tiling, q, k, v)
    arrays = (q, k, v, beta_BTH, log_decay_BTHK, S_BHKV, None)
    o_BTHV, final_BHKV = chunked.run(*arrays, scale=tiling.scale)
    return o_BTHV.reshape(B, T, -1), final_BHKV


def _specs(tiling: Tiling, backward: bool):
    """Returns the kernels' block specs by kind of block, such as "key" or "states". Grid: rows of
    the batch, groups of heads, chunks (backward: from the last)."""
    C, heads, keys = tiling.C, tiling.heads, tiling.keys
    last = tiling.chunks - 1
    at = (lambda n: last - n) if backward else (lambda n: n)
    rows = heads * (1 + (tiling.decay == "per_token"))
    return {
        "key": pl.BlockSpec(
            (1, C, keys * tiling.K), lambda b, h, n: (b, at(n), h // tiling.shared)
        ),
        "own key": pl.BlockSpec((1, C, keys * tiling.K), lambda b, h, n: (b, at(n), h)),
        "value": pl.BlockSpec((1, C, heads * tiling.V), lambda b, h, n: (b, at(n), h)),
        "decay": pl.BlockSpec((1, C, heads * tiling.K), lambda b, h, n: (b, at(n), h)),
        "gates": pl.BlockSpec((1, 1, 1, rows, C), lambda b, h, n: (b, h, at(n), 0, 0)),
        "state": pl.BlockSpec((1, heads, tiling.K, tiling.V), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec(
            (1, 1, heads, tiling.K, tiling.V), lambda b, h, n: (b, at(n), h, 0, 0)
        ),
    }


def _launch(tiling: Tiling, kernel, inputs, outputs):
    """Launches the forward or backward kernel and returns its outputs. inputs, outputs: (kind of
    block in `_specs`, array or shape and dtype) pairs; those of None are left out."""
    specs = _specs(tiling, kernel is _backward_kernel)
    return tpu_tiling.launch(
        functools.partial(kernel, tiling),
        f"delta_rule_{tiling.decay}_decay{kernel.__name__.removesuffix('_kernel')}",
        (tiling.B, tiling.groups, tiling.chunks),
        *([(specs[kind], x) for kind, x in side if x is not None] for side in (inputs, outputs)),
        scratch=[(tiling.heads, tiling.K, tiling.V)],
        semantics=("parallel", "parallel", "arbitrary"),
    )


def _forward(tiling: Tiling, keep: bool, q, k, v, gates, g, S_BHKV):
    """Launches the forward kernel; returns o and the final state. keep: also returns the states
    that enter the chunks, for the backward pass."""
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("state", S_BHKV)]
    B, H, K, V = S_BHKV.shape
    states = jax.ShapeDtypeStruct((B, tiling.chunks, H, K, V), jnp.float32) if keep else None
    outputs = [("value", v), ("state", S_BHKV), ("states", states)]
    return _launch(tiling, _forward_kernel, [*inputs, ("decay", g)], outputs)


def _backward(tiling: Tiling, q, k, v, gates, g, states, do, dS_BHKV):
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("states", states)]
    inputs += [("value", do), ("state", dS_BHKV), ("decay", g)]
    # Steps that share a key head write its gradient apart, in float32.
    dtype = jnp.float32 if tiling.shared > 1 else q.dtype
    dq = jax.ShapeDtypeStruct((*q.shape[:2], tiling.groups * tiling.keys * tiling.K), dtype)
    outputs = [("own key", dq), ("own key", dq), ("value", v), ("gates", gates)]
    outputs += [("state", dS_BHKV), ("decay", g)]
    dq, dk, dv, dgates, dS, *dg = _launch(tiling, _backward_kernel, inputs, outputs)
    if tiling.shared > 1:
        apart = (*dq.shape[:2], tiling.G, tiling.shared, tiling.K)
        dq, dk = (
            jnp.sum(x.reshape(apart), axis=3).reshape(y.shape).astype(y.dtype)
            for x, y in ((dq, q), (dk, k))
        )
    return dq, dk, dv, dgates, dg[0] if dg else None, dS


_run = vjp.differentiable(_forward, _backward, _plain)


def _algebra(tiling):
    """Returns the module with the equations of one chunk for the call's decay."""
    return per_channel if tiling.per_channel else per_token


def _lanes(head, width):
    return slice(head * width, (head + 1) * width)


def _inputs(tiling, h, q_ref, k_ref, v_ref):
    key_lanes = _lanes(h // tiling.copies, tiling.K)
    return q_ref[0, :, key_lanes], k_ref[0, :, key_lanes], v_ref[0, :, _lanes(h, tiling.V)]


def _forward_kernel(tiling: Tiling, q_ref, k_ref, v_ref, gates_ref, initial_ref, *refs):
    g_CHK = None
    if tiling.per_channel:
        g_ref, *refs = refs
        g_CHK = g_ref[0]
    o_ref, final_ref, *states_ref, S_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        S_ref[...] = initial_ref[0]

    p, algebra, heads = tiling.products, _algebra(tiling), range(tiling.heads)
    gates: Any = algebra.gates_of(p, tiling.heads, gates_ref[0, 0, 0], g_CHK)
    for h in heads:
        for ref in states_ref:
            ref[0, 0, h] = S_ref[h]
    # The heads' generators run in step, so that they fill each other's gaps.
    done = primitives.in_turns(
        algebra.forward(
            p, gates[h], tiling.scale, *_inputs(tiling, h, q_ref, k_ref, v_ref), S_ref[h]
        )
        for h in heads
    )
    for h, (o_CV, S_KV) in zip(heads, done):
        o_ref[0, :, _lanes(h, tiling.V)] = o_CV.astype(o_ref.dtype)
        S_ref[h] = S_KV

    @pl.when(n == tiling.chunks - 1)
    def _():
        final_ref[0] = S_ref[...]


def _backward_kernel(
    tiling: Tiling, q_ref, k_ref, v_ref, gates_ref, states_ref, do_ref, dfinal_ref, *refs
):
    g_CHK, dg_ref = None, cast(Any, None)
    if tiling.per_channel:
        g_ref, *refs, dg_ref, dS_ref = refs
        g_CHK, refs = g_ref[0], (*refs, dS_ref)
    dq_ref, dk_ref, dv_ref, dgates_ref, dinitial_ref, dS_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        dS_ref[...] = dfinal_ref[0]

    p, algebra, heads = tiling.products, _algebra(tiling), range(tiling.heads)
    gates: Any = algebra.gates_of(p, tiling.heads, gates_ref[0, 0, 0], g_CHK)

    def one_head(h):
        inputs = _inputs(tiling, h, q_ref, k_ref, v_ref)
        do_CV = do_ref[0, :, _lanes(h, tiling.V)]
        S_KV, dS_KV = states_ref[0, 0, h], dS_ref[h]
        return algebra.backward(p, gates[h], tiling.scale, *inputs, S_KV, do_CV, dS_KV)

    dq_CK = dk_CK = 0.0
    for h, d in zip(heads, primitives.in_turns(one_head(h) for h in heads)):
        dS_ref[h] = d.dS_KV
        dv_ref[0, :, _lanes(h, tiling.V)] = d.dv_CV.astype(dv_ref.dtype)
        dgates_ref[0, 0, 0, h : h + 1] = d.dbeta_1C
        if tiling.decay == "per_token":
            dgates_ref[0, 0, 0, tiling.heads + h : tiling.heads + h + 1] = d.dg
        if tiling.per_channel:
            dg_ref[0, :, _lanes(h, tiling.K)] = d.dg
        dq_CK, dk_CK = dq_CK + d.dq_CK, dk_CK + d.dk_CK
        if (h + 1) % tiling.copies == 0 or h + 1 == tiling.heads:  # the last of its key head
            key_lanes = _lanes(h // tiling.copies, tiling.K)
            dq_ref[0, :, key_lanes] = dq_CK.astype(dq_ref.dtype)
            dk_ref[0, :, key_lanes] = dk_CK.astype(dk_ref.dtype)
            dq_CK = dk_CK = 0.0

    @pl.when(n == tiling.chunks - 1)
    def _():
        dinitial_ref[0] = dS_ref[...]
