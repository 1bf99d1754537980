"""The delta rule as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads; the steps of a sequence follow one another, and the heads' states stay in VMEM
between them. All of a chunk's algebra is inside the step (`tpu_head_decay.py`), so that HBM sees the inputs once and the
outputs once. For the backward pass the forward one also writes the state that enters each chunk; the rest is computed
again. Heads lie side by side in the lanes, as projections give them, so nothing is transposed but the gates.
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
from kernels_pallas.ops.delta_rule.tpu.tiling import VMEM_BYTES, Plan, plan_of, unsupported
from kernels_pallas.tpu import primitives

__all__ = ["run", "unsupported"]


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
    plan = plan_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale)
    if segment_ids_BT is not None:
        starts_BT11 = segments.starts(segment_ids_BT)[:, :, None, None]
        log_decay = jnp.zeros((1, 1, plan.H, 1)) if log_decay_BTHK is None else log_decay_BTHK
        log_decay_BTHK = jnp.where(starts_BT11, decay.RESET, log_decay)
    dtype = jnp.bfloat16 if plan.products.narrow else jnp.float32
    q, k = (_flat(x, plan, plan.K, dtype) for x in (q_BTGK, k_BTGK))
    v, g, gates = _flat(v_BTHV, plan, plan.V, dtype), None, [beta_BTH]
    if plan.decay == "channel":
        g = _flat(log_decay_BTHK, plan, plan.K, jnp.float32)
    if plan.decay == "head":
        gates.append(log_decay_BTHK[..., 0])
    K, V = initial_state_BHKV.shape[2:]
    more = ((0, 0), (0, 0), (0, plan.K - K), (0, plan.V - V))
    S_BHKV = jnp.pad(initial_state_BHKV.astype(jnp.float32), more)
    o, final_BHKV = _run(plan, None, q, k, v, _gate_rows(gates, plan), g, S_BHKV)
    o_BTHV = o.reshape(plan.B, -1, plan.H, plan.V)[:, : plan.T, :, :V]
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV[:, :, :K, :V]


def _flat(x_BTHK, plan, K, dtype):
    """(B, T, H, dim) to (B, chunks * C, H * K), padded by tokens, and by channels, that do nothing."""
    B, T, H, dim = x_BTHK.shape
    more = ((0, 0), (0, plan.chunks * plan.C - T), (0, 0), (0, K - dim))
    return jnp.pad(x_BTHK.astype(dtype), more).reshape(B, -1, H * K)


def _gate_rows(gates, plan):
    """Each (B, T, H) to (B, groups, chunks, gates * heads, C): tokens in the lanes."""

    def one(x_BTH):
        x = x_BTH.astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, plan.chunks * plan.C - plan.T), (0, 0)))
        x = x.reshape(plan.B, plan.chunks, plan.C, plan.groups, plan.heads)
        return x.transpose(0, 3, 1, 4, 2)

    return jnp.concatenate([one(x) for x in gates], axis=3)


def _without_states(plan, _, *arrays):
    """arrays: q, k, v, the gates' rows, log decay per channel or None, the state."""
    return _forward(plan, False, *arrays)


def _with_states(plan, _, *arrays):
    o, final, states = _forward(plan, True, *arrays)
    return (o, final), states


def _gradients(plan, _, arrays, states, cotangents):
    q, k, v, gates, g, _ = arrays
    dq, dk, *others = _backward(plan, q, k, v, gates, g, states, *cotangents)
    if plan.shared > 1:
        lead = (*dq.shape[:2], plan.G, plan.shared, plan.K)
        dq, dk = (
            jnp.sum(x.reshape(lead), axis=3).reshape(y.shape).astype(y.dtype)
            for x, y in ((dq, q), (dk, k))
        )
    return dq, dk, *others


def _chunked(plan, _, q, k, v, gates, g, S_BHKV):
    B, T, G, H = *v.shape[:2], plan.G, plan.H
    rows = gates.reshape(B, plan.groups, plan.chunks, -1, plan.heads, plan.C)
    beta_BTH, *log_decay = rows.transpose(3, 0, 2, 5, 1, 4).reshape(-1, B, T, H)
    log_decay_BTHK = log_decay[0][..., None] if log_decay else None
    if g is not None:
        log_decay_BTHK = g.reshape(B, T, H, plan.K)
    q, k, v = (x.reshape(B, T, heads, -1) for x, heads in ((q, G), (k, G), (v, H)))
    arrays = q, k, v, beta_BTH, log_decay_BTHK, S_BHKV
    o_BTHV, final_BHKV = chunked.run(*arrays, None, scale=plan.scale)
    return o_BTHV.reshape(B, T, -1), final_BHKV


_run = kernel_vjp.differentiable(_with_states, _gradients, _chunked, call=_without_states)


def _specs(plan: Plan, backward: bool):
    """Block specs by what a block holds; the backward pass takes the chunks in reverse."""
    C, heads, keys = plan.C, plan.heads, plan.keys
    last = plan.chunks - 1
    at = (lambda n: last - n) if backward else (lambda n: n)
    rows = heads * (1 + (plan.decay == "head"))
    return {
        "key": pl.BlockSpec((1, C, keys * plan.K), lambda b, h, n: (b, at(n), h // plan.shared)),
        "own key": pl.BlockSpec((1, C, keys * plan.K), lambda b, h, n: (b, at(n), h)),
        "value": pl.BlockSpec((1, C, heads * plan.V), lambda b, h, n: (b, at(n), h)),
        "decay": pl.BlockSpec((1, C, heads * plan.K), lambda b, h, n: (b, at(n), h)),
        "gates": pl.BlockSpec((1, 1, 1, rows, C), lambda b, h, n: (b, h, at(n), 0, 0)),
        "state": pl.BlockSpec((1, heads, plan.K, plan.V), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, 1, heads, plan.K, plan.V), lambda b, h, n: (b, at(n), h, 0, 0)),
    }


def _forward(plan: Plan, keep: bool, q, k, v, gates, g, S_BHKV):
    """keep: also the state that enters each chunk."""
    ins, operands = ["key", "key", "value", "gates", "state"], [q, k, v, gates, S_BHKV]
    outs, shapes = ["value", "state"], [v, S_BHKV]
    if plan.decay == "channel":
        ins.append("decay")
        operands.append(g)
    if keep:
        outs.append("states")
        B, H, K, V = S_BHKV.shape
        shapes.append(jax.ShapeDtypeStruct((B, plan.chunks, H, K, V), jnp.float32))
    return tuple(_call(plan, _forward_kernel, ins, operands, outs, shapes))


def _backward(plan: Plan, q, k, v, gates, g, states, do, dS_BHKV):
    ins = ["key", "key", "value", "gates", "states", "value", "state"]
    operands = [q, k, v, gates, states, do, dS_BHKV]
    wide = jnp.float32 if plan.shared > 1 else q.dtype
    dq = jax.ShapeDtypeStruct((*q.shape[:2], plan.groups * plan.keys * plan.K), wide)
    outs, shapes = ["own key", "own key", "value", "gates", "state"], [dq, dq, v, gates, dS_BHKV]
    if plan.decay == "channel":
        ins.append("decay")
        operands.append(g)
        outs.append("decay")
        shapes.append(g)
    *gradients, dS, dg = (*_call(plan, _backward_kernel, ins, operands, outs, shapes), None)[:6]
    return (*gradients, dg, dS)


def _call(plan: Plan, kernel, ins, operands, outs, shapes):
    specs = _specs(plan, kernel is _backward_kernel)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.B, plan.groups, plan.chunks),
        in_specs=[specs[kind] for kind in ins],
        out_specs=[specs[kind] for kind in outs],
        out_shape=manual_axes.shapes(shapes, operands),
        scratch_shapes=[pltpu.VMEM((plan.heads, plan.K, plan.V), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES + (8 << 20),
        ),
        interpret=devices.interpreting(),
        name=f"delta_rule_{plan.decay or 'no'}_decay{kernel.__name__.removesuffix('_kernel')}",
    )(*operands)


def _form(plan):
    return per_channel if plan.decay == "channel" else per_token


def _lanes(head, width):
    return slice(head * width, (head + 1) * width)


def _inputs(plan, h, q_ref, k_ref, v_ref):
    key_lanes = _lanes(h // plan.copies, plan.K)
    return q_ref[0, :, key_lanes], k_ref[0, :, key_lanes], v_ref[0, :, _lanes(h, plan.V)]


def _forward_kernel(plan: Plan, q_ref, k_ref, v_ref, gates_ref, initial_ref, *refs):
    g_CHK = None
    if plan.decay == "channel":
        g_ref, *refs = refs
        g_CHK = g_ref[0]
    o_ref, final_ref, *states_ref, S_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        S_ref[...] = initial_ref[0]

    p, form, heads = plan.products, _form(plan), range(plan.heads)
    gates = form.gates_of(p, plan.heads, gates_ref[0, 0, 0], g_CHK)
    for h in heads:
        for ref in states_ref:
            ref[0, 0, h] = S_ref[h]
    done = primitives.in_turns(
        form.forward(p, gates[h], plan.scale, *_inputs(plan, h, q_ref, k_ref, v_ref), S_ref[h])
        for h in heads
    )
    for h, (o_CV, S_KV) in zip(heads, done):
        o_ref[0, :, _lanes(h, plan.V)] = o_CV.astype(o_ref.dtype)
        S_ref[h] = S_KV

    @pl.when(n == plan.chunks - 1)
    def _():
        final_ref[0] = S_ref[...]


def _backward_kernel(
    plan: Plan, q_ref, k_ref, v_ref, gates_ref, states_ref, do_ref, dfinal_ref, *refs
):
    g_CHK = dg_ref = None
    if plan.decay == "channel":
        g_ref, *refs, dg_ref, dS_ref = refs
        g_CHK, refs = g_ref[0], (*refs, dS_ref)
    dq_ref, dk_ref, dv_ref, dgates_ref, dinitial_ref, dS_ref = refs
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        dS_ref[...] = dfinal_ref[0]

    p, form, heads = plan.products, _form(plan), range(plan.heads)
    gates = form.gates_of(p, plan.heads, gates_ref[0, 0, 0], g_CHK)

    def one_head(h):
        inputs = _inputs(plan, h, q_ref, k_ref, v_ref)
        do_CV = do_ref[0, :, _lanes(h, plan.V)]
        S_KV, dS_KV = states_ref[0, 0, h], dS_ref[h]
        return form.backward(p, gates[h], plan.scale, *inputs, S_KV, do_CV, dS_KV)

    dq_CK = dk_CK = 0.0
    for h, d in zip(heads, primitives.in_turns(one_head(h) for h in heads)):
        dS_ref[h] = d.dS_KV
        dv_ref[0, :, _lanes(h, plan.V)] = d.dv_CV.astype(dv_ref.dtype)
        dgates_ref[0, 0, 0, h : h + 1] = d.dbeta_1C
        if plan.decay == "head":
            dgates_ref[0, 0, 0, plan.heads + h : plan.heads + h + 1] = d.dg
        if plan.decay == "channel":
            dg_ref[0, :, _lanes(h, plan.K)] = d.dg
        dq_CK, dk_CK = dq_CK + d.dq_CK, dk_CK + d.dk_CK
        if (h + 1) % plan.copies == 0 or h + 1 == plan.heads:  # the last of its key head
            key_lanes = _lanes(h // plan.copies, plan.K)
            dq_ref[0, :, key_lanes] = dq_CK.astype(dq_ref.dtype)
            dk_ref[0, :, key_lanes] = dk_CK.astype(dk_ref.dtype)
            dq_CK = dk_CK = 0.0

    @pl.when(n == plan.chunks - 1)
    def _():
        dinitial_ref[0] = dS_ref[...]
