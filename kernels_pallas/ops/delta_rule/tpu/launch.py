"""The delta rule as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads; the steps of a sequence follow one another, and the heads'
states stay in VMEM between them. All of a chunk's algebra is inside the step (`tpu_head_decay.py`),
so that HBM sees the inputs once and the outputs once. For the backward pass the forward one also
writes the state that enters each chunk; the rest is computed again. Heads lie side by side in the
lanes, as projections give them, so nothing is transposed but the gates.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import decay, kernel_vjp, segments
from kernels_pallas.dispatch import devices, manual_axes
from kernels_pallas.ops.delta_rule import chunked
from kernels_pallas.ops.delta_rule.tpu import per_channel, per_token
from kernels_pallas.ops.delta_rule.tpu.tiling import (
    VMEM_BYTES,
    Tiling,
    tiling_of,
    unsupported_reason,
)
from kernels_pallas.tpu import primitives

__all__ = ["run", "unsupported_reason"]


def run(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    beta_BTH,
    log_decay_BTHK,
    initial_state_BHKV,
    segment_ids_BT,
    scale,
    chunk_size=None,
):
    """The kernels. Arguments are normalised by `api.py`."""
    tiling = tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale)
    if segment_ids_BT is not None:
        starts_BT11 = segments.starts(segment_ids_BT)[:, :, None, None]
        log_decay = jnp.zeros((1, 1, tiling.H, 1)) if log_decay_BTHK is None else log_decay_BTHK
        log_decay_BTHK = jnp.where(starts_BT11, decay.RESET, log_decay)
    dtype = jnp.bfloat16 if tiling.products.narrow else jnp.float32
    q, k = (_flat(x, tiling, tiling.K, dtype) for x in (q_BTGK, k_BTGK))
    v, g, gates = _flat(v_BTHV, tiling, tiling.V, dtype), None, [beta_BTH]
    if tiling.decay == "per_channel":
        g = _flat(log_decay_BTHK, tiling, tiling.K, jnp.float32)
    if tiling.decay == "per_token":
        gates.append(log_decay_BTHK[..., 0])
    K, V = initial_state_BHKV.shape[2:]
    more = ((0, 0), (0, 0), (0, tiling.K - K), (0, tiling.V - V))
    S_BHKV = jnp.pad(initial_state_BHKV.astype(jnp.float32), more)
    o, final_BHKV = _run(tiling, None, q, k, v, _gate_rows(gates, tiling), g, S_BHKV)
    o_BTHV = o.reshape(tiling.B, -1, tiling.H, tiling.V)[:, : tiling.T, :, :V]
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV[:, :, :K, :V]


def _flat(x_BTHK, tiling, K, dtype):
    """(B, T, H, dim) to (B, chunks * C, H * K), padded by tokens, and by channels, that do nothing."""
    B, T, H, dim = x_BTHK.shape
    more = ((0, 0), (0, tiling.chunks * tiling.C - T), (0, 0), (0, K - dim))
    return jnp.pad(x_BTHK.astype(dtype), more).reshape(B, -1, H * K)


def _gate_rows(gates, tiling):
    """Each (B, T, H) to (B, groups, chunks, gates * heads, C): tokens in the lanes."""

    def one(x_BTH):
        x = x_BTH.astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, tiling.chunks * tiling.C - tiling.T), (0, 0)))
        x = x.reshape(tiling.B, tiling.chunks, tiling.C, tiling.groups, tiling.heads)
        return x.transpose(0, 3, 1, 4, 2)

    return jnp.concatenate([one(x) for x in gates], axis=3)


def _without_states(tiling, _, *arrays):
    """arrays: q, k, v, the gates' rows, log decay per channel or None, the state."""
    return _forward(tiling, False, *arrays)


def _with_states(tiling, _, *arrays):
    o, final, states = _forward(tiling, True, *arrays)
    return (o, final), states


def _gradients(tiling, _, arrays, states, cotangents):
    q, k, v, gates, g, _ = arrays
    dq, dk, *others = _backward(tiling, q, k, v, gates, g, states, *cotangents)
    if tiling.shared > 1:
        lead = (*dq.shape[:2], tiling.G, tiling.shared, tiling.K)
        dq, dk = (
            jnp.sum(x.reshape(lead), axis=3).reshape(y.shape).astype(y.dtype)
            for x, y in ((dq, q), (dk, k))
        )
    return dq, dk, *others


def _chunked(tiling, _, q, k, v, gates, g, S_BHKV):
    B, T, G, H = *v.shape[:2], tiling.G, tiling.H
    rows = gates.reshape(B, tiling.groups, tiling.chunks, -1, tiling.heads, tiling.C)
    beta_BTH, *log_decay = rows.transpose(3, 0, 2, 5, 1, 4).reshape(-1, B, T, H)
    log_decay_BTHK = log_decay[0][..., None] if log_decay else None
    if g is not None:
        log_decay_BTHK = g.reshape(B, T, H, tiling.K)
    q, k, v = (x.reshape(B, T, heads, -1) for x, heads in ((q, G), (k, G), (v, H)))
    arrays = q, k, v, beta_BTH, log_decay_BTHK, S_BHKV
    o_BTHV, final_BHKV = chunked.run(*arrays, None, scale=tiling.scale)
    return o_BTHV.reshape(B, T, -1), final_BHKV


_run = kernel_vjp.differentiable(_with_states, _gradients, _chunked, call=_without_states)


def _specs(tiling: Tiling, backward: bool):
    """Block specs by what a block holds; the backward pass takes the chunks in reverse."""
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


def _forward(tiling: Tiling, keep: bool, q, k, v, gates, g, S_BHKV):
    """keep: also the state that enters each chunk."""
    ins, operands = ["key", "key", "value", "gates", "state"], [q, k, v, gates, S_BHKV]
    outs, shapes = ["value", "state"], [v, S_BHKV]
    if tiling.decay == "per_channel":
        ins.append("decay")
        operands.append(g)
    if keep:
        outs.append("states")
        B, H, K, V = S_BHKV.shape
        shapes.append(jax.ShapeDtypeStruct((B, tiling.chunks, H, K, V), jnp.float32))
    return tuple(_call(tiling, _forward_kernel, ins, operands, outs, shapes))


def _backward(tiling: Tiling, q, k, v, gates, g, states, do, dS_BHKV):
    ins = ["key", "key", "value", "gates", "states", "value", "state"]
    operands = [q, k, v, gates, states, do, dS_BHKV]
    wide = jnp.float32 if tiling.shared > 1 else q.dtype
    dq = jax.ShapeDtypeStruct((*q.shape[:2], tiling.groups * tiling.keys * tiling.K), wide)
    outs, shapes = ["own key", "own key", "value", "gates", "state"], [dq, dq, v, gates, dS_BHKV]
    if tiling.decay == "per_channel":
        ins.append("decay")
        operands.append(g)
        outs.append("decay")
        shapes.append(g)
    *gradients, dS, dg = (*_call(tiling, _backward_kernel, ins, operands, outs, shapes), None)[:6]
    return (*gradients, dg, dS)


def _call(tiling: Tiling, kernel, ins, operands, outs, shapes):
    specs = _specs(tiling, kernel is _backward_kernel)
    return pl.pallas_call(
        functools.partial(kernel, tiling),
        grid=(tiling.B, tiling.groups, tiling.chunks),
        in_specs=[specs[kind] for kind in ins],
        out_specs=[specs[kind] for kind in outs],
        out_shape=manual_axes.shapes(shapes, operands),
        scratch_shapes=[pltpu.VMEM((tiling.heads, tiling.K, tiling.V), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES + (8 << 20),
        ),
        interpret=devices.interpreting(),
        name=f"delta_rule_{tiling.decay}_decay{kernel.__name__.removesuffix('_kernel')}",
    )(*operands)


def _form(tiling):
    return per_channel if tiling.decay == "per_channel" else per_token


def _lanes(head, width):
    return slice(head * width, (head + 1) * width)


def _inputs(tiling, h, q_ref, k_ref, v_ref):
    key_lanes = _lanes(h // tiling.copies, tiling.K)
    return q_ref[0, :, key_lanes], k_ref[0, :, key_lanes], v_ref[0, :, _lanes(h, tiling.V)]


def _forward_kernel(tiling: Tiling, q_ref, k_ref, v_ref, gates_ref, initial_ref, *refs):
    g_CHK = None
    if tiling.decay == "per_channel":
        g_ref, *refs = refs
        g_CHK = g_ref[0]
    o_ref, final_ref, *states_ref, S_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        S_ref[...] = initial_ref[0]

    p, form, heads = tiling.products, _form(tiling), range(tiling.heads)
    gates = form.gates_of(p, tiling.heads, gates_ref[0, 0, 0], g_CHK)
    for h in heads:
        for ref in states_ref:
            ref[0, 0, h] = S_ref[h]
    done = primitives.in_turns(
        form.forward(p, gates[h], tiling.scale, *_inputs(tiling, h, q_ref, k_ref, v_ref), S_ref[h])
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
    g_CHK = dg_ref = None
    if tiling.decay == "per_channel":
        g_ref, *refs, dg_ref, dS_ref = refs
        g_CHK, refs = g_ref[0], (*refs, dS_ref)
    dq_ref, dk_ref, dv_ref, dgates_ref, dinitial_ref, dS_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        dS_ref[...] = dfinal_ref[0]

    p, form, heads = tiling.products, _form(tiling), range(tiling.heads)
    gates = form.gates_of(p, tiling.heads, gates_ref[0, 0, 0], g_CHK)

    def one_head(h):
        inputs = _inputs(tiling, h, q_ref, k_ref, v_ref)
        do_CV = do_ref[0, :, _lanes(h, tiling.V)]
        S_KV, dS_KV = states_ref[0, 0, h], dS_ref[h]
        return form.backward(p, gates[h], tiling.scale, *inputs, S_KV, do_CV, dS_KV)

    dq_CK = dk_CK = 0.0
    for h, d in zip(heads, primitives.in_turns(one_head(h) for h in heads)):
        dS_ref[h] = d.dS_KV
        dv_ref[0, :, _lanes(h, tiling.V)] = d.dv_CV.astype(dv_ref.dtype)
        dgates_ref[0, 0, 0, h : h + 1] = d.dbeta_1C
        if tiling.decay == "per_token":
            dgates_ref[0, 0, 0, tiling.heads + h : tiling.heads + h + 1] = d.dg
        if tiling.decay == "per_channel":
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
