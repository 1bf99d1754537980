"""The delta rule as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads; the steps of a sequence follow one another, and the heads' states stay in VMEM
between them. All of a chunk's algebra is inside the step (`tpu_head_decay.py`), so that HBM sees the inputs once and the
outputs once. For the backward pass the forward one also writes the state that enters each chunk; the rest is computed
again. Heads lie side by side in the lanes, as projections give them, so nothing is transposed but the gates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import segments, targets
from kernels_pallas.delta_rule import tpu_head_decay
from kernels_pallas.tpu_blocks import Products


class Plan(NamedTuple):
    """Sizes of one call, and how it is cut: hashable, chosen before tracing.

    heads: value heads a grid step; keys: key heads a grid step. Several steps may read one key head: shared.
    decay: None, "head" or "channel".
    """

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    C: int
    heads: int
    keys: int
    decay: str | None
    products: Products
    scale: float

    @property
    def chunks(self):
        return -(-self.T // self.C)

    @property
    def groups(self):
        return self.H // self.heads

    @property
    def shared(self):
        """Grid steps that read the same key heads."""
        return self.groups * self.keys // self.G


def pallas_tpu(
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
    """The delta rule on a TPU. Arguments are normalised by `api.py`."""
    plan = plan_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, scale, chunk_size)
    dtype = jnp.bfloat16 if plan.products.narrow else jnp.float32
    if plan.decay and log_decay_BTHK is None:
        log_decay_BTHK = jnp.zeros((plan.B, plan.T, plan.H, 1), jnp.float32)
    if segment_ids_BT is not None:
        starts_BT = segments.starts(segment_ids_BT)
        log_decay_BTHK = jnp.where(starts_BT[:, :, None, None], -jnp.inf, log_decay_BTHK)
    wide_BTHK = None if plan.decay != "channel" else log_decay_BTHK.astype(jnp.float32)
    gates = (beta_BTH,) if plan.decay != "head" else (beta_BTH, log_decay_BTHK[..., 0])
    o_BTHV, final_BHKV = _run(
        plan,
        *(_flat(x, plan, dtype) for x in (q_BTGK, k_BTGK, v_BTHV)),
        _gate_rows(gates, plan),
        None if wide_BTHK is None else _flat(wide_BTHK, plan, jnp.float32),
        initial_state_BHKV,
    )
    o_BTHV = o_BTHV[:, : plan.T].reshape(v_BTHV.shape)
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV


def plan_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, scale, chunk_size=None) -> Plan:
    """How a call is cut."""
    B, T, H, V = v_BTHV.shape
    G, K = k_BTGK.shape[2:]
    narrow = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV))
    exact = not narrow and log_decay_BTHK is None
    C = chunk_size or (128 if narrow else 32)
    C = max(16, min(C, 1 << (T - 1).bit_length()))
    if log_decay_BTHK is None:
        decay = None if segment_ids_BT is None else "head"
    else:
        decay = "head" if log_decay_BTHK.shape[-1] == 1 else "channel"
    heads, keys = _heads_a_step(G, H, K, V)
    return Plan(B, T, G, H, K, V, C, heads, keys, decay, Products(narrow, exact), float(scale))


HEADS = 4


def _heads_a_step(G, H, K, V):
    """Value and key heads a step: whole lanes of 128, or all there are."""
    copies, best = H // G, None
    for heads in range(1, H + 1):
        keys = max(1, heads // copies)
        if H % heads or (heads % copies and copies % heads):
            continue
        if (heads * V % 128 and heads < H) or (keys * K % 128 and keys < G):
            continue
        if best is None or heads <= HEADS:
            best = heads, keys
    return best


def _flat(x_BTHK, plan, dtype):
    """(B, T, H, K) to (B, chunks * C, H * K), padded by tokens that do nothing."""
    B, T, H, K = x_BTHK.shape
    x = x_BTHK.reshape(B, T, H * K).astype(dtype)
    return jnp.pad(x, ((0, 0), (0, plan.chunks * plan.C - T), (0, 0)))


def _gate_rows(gates, plan):
    """Each (B, T, H) to (B, groups, chunks, gates * heads, C): tokens in the lanes."""

    def one(x_BTH):
        x = x_BTH.astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, plan.chunks * plan.C - plan.T), (0, 0)))
        x = x.reshape(plan.B, plan.chunks, plan.C, plan.groups, plan.heads)
        return x.transpose(0, 3, 1, 4, 2)

    return jnp.concatenate([one(x) for x in gates], axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan, q, k, v, gates, g, S_BHKV):
    return _forward(plan, False, q, k, v, gates, g, S_BHKV)


def _run_forward(plan, q, k, v, gates, g, S_BHKV):
    o, final, states = _forward(plan, True, q, k, v, gates, g, S_BHKV)
    return (o, final), (q, k, v, gates, g, states)


def _run_backward(plan, residuals, cotangents):
    q, k, v, gates, g, states = residuals
    dq, dk, dv, dgates, dS = _backward(plan, q, k, v, gates, g, states, *cotangents)
    if plan.shared > 1:
        lead = (*dq.shape[:2], plan.G, plan.shared, plan.K)
        dq, dk = (
            jnp.sum(x.reshape(lead), axis=3).reshape(y.shape).astype(y.dtype)
            for x, y in ((dq, q), (dk, k))
        )
    return dq, dk, dv, dgates, None, dS


_run.defvjp(_run_forward, _run_backward)


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
        "gates": pl.BlockSpec((1, 1, 1, rows, C), lambda b, h, n: (b, h, at(n), 0, 0)),
        "state": pl.BlockSpec((1, heads, plan.K, plan.V), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, 1, heads, plan.K, plan.V), lambda b, h, n: (b, at(n), h, 0, 0)),
    }


def _call(plan: Plan, kernel, name, specs, ins, outs, out_shapes, operands):
    return pl.pallas_call(
        kernel,
        grid=(plan.B, plan.groups, plan.chunks),
        in_specs=[specs[kind] for kind in ins],
        out_specs=[specs[kind] for kind in outs],
        out_shape=out_shapes,
        scratch_shapes=[pltpu.VMEM((plan.heads, plan.K, plan.V), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=64 << 20,
        ),
        interpret=targets.interpreting(),
        name=name,
    )(*operands)


def _forward(plan: Plan, keep: bool, q, k, v, gates, g, S_BHKV):
    B, N, H, K, V = plan.B, plan.chunks, plan.H, plan.K, plan.V
    ins, outs = ["key", "key", "value", "gates", "state"], ["value", "state"]
    operands = [q, k, v, gates, S_BHKV]
    shapes = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(S_BHKV.shape, jnp.float32),
    ]
    if keep:
        outs.append("states")
        shapes.append(jax.ShapeDtypeStruct((B, N, H, K, V), jnp.float32))
    kernel = functools.partial(_forward_kernel, plan, keep)
    name = f"delta_rule_{plan.decay or 'no'}_decay_forward"
    return tuple(_call(plan, kernel, name, _specs(plan, False), ins, outs, shapes, operands))


def _backward(plan: Plan, q, k, v, gates, g, states, do, dS_BHKV):
    ins = ["key", "key", "value", "gates", "states", "value", "state"]
    outs = ["own key", "own key", "value", "gates", "state"]
    wide = jnp.float32 if plan.shared > 1 else q.dtype
    dq = jax.ShapeDtypeStruct((*q.shape[:2], plan.groups * plan.keys * plan.K), wide)
    shapes = [dq, dq, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, gates, dS_BHKV))]
    kernel = functools.partial(_backward_kernel, plan)
    name = f"delta_rule_{plan.decay or 'no'}_decay_backward"
    operands = [q, k, v, gates, states, do, dS_BHKV]
    return _call(plan, kernel, name, _specs(plan, True), ins, outs, shapes, operands)


def _forward_kernel(
    plan: Plan, keep, q_ref, k_ref, v_ref, gates_ref, S0_ref, o_ref, final_ref, *rest
):
    S_ref = rest[-1]
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        S_ref[...] = S0_ref[0]

    p, K, V = plan.products, plan.K, plan.V
    copies = plan.heads // plan.keys
    gates = tpu_head_decay.gates_of(p, plan.heads, gates_ref[0, 0, 0])
    for key in range(plan.keys):
        q_CK, k_CK = (x[0, :, key * K : (key + 1) * K] for x in (q_ref, k_ref))
        qk_CC, kk_CC = p.coarse(q_CK, k_CK, (1, 1)), p.coarse(k_CK, k_CK, (1, 1))
        lost_CC = tpu_head_decay.lost_products(p, k_CK, kk_CC)
        for h in range(key * copies, (key + 1) * copies):
            v_CV, S_KV = v_ref[0, :, h * V : (h + 1) * V], S_ref[h]
            c = tpu_head_decay.chunk(
                p, gates[h], plan.scale, qk_CC, kk_CC, lost_CC, k_CK, v_CV, S_KV
            )
            o_CV = tpu_head_decay.output(p, gates[h], plan.scale, q_CK, c, S_KV)
            o_ref[0, :, h * V : (h + 1) * V] = o_CV.astype(o_ref.dtype)
            if keep:
                rest[0][0, 0, h] = S_KV
            S_ref[h] = tpu_head_decay.next_state(p, gates[h], k_CK, c, S_KV)

    @pl.when(n == plan.chunks - 1)
    def _():
        final_ref[0] = S_ref[...]


def _backward_kernel(
    plan: Plan,
    q_ref,
    k_ref,
    v_ref,
    gates_ref,
    states_ref,
    do_ref,
    dfinal_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dgates_ref,
    dinitial_ref,
    dS_ref,
):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        dS_ref[...] = dfinal_ref[0]

    p, K, V = plan.products, plan.K, plan.V
    copies = plan.heads // plan.keys
    gates = tpu_head_decay.gates_of(p, plan.heads, gates_ref[0, 0, 0])
    for key in range(plan.keys):
        lanes = slice(key * K, (key + 1) * K)
        q_CK, k_CK = q_ref[0, :, lanes], k_ref[0, :, lanes]
        qk_CC, kk_CC = p.coarse(q_CK, k_CK, (1, 1)), p.coarse(k_CK, k_CK, (1, 1))
        lost_CC = tpu_head_decay.lost_products(p, k_CK, kk_CC)
        dqk_CC = dkk_CC = dq_CK = dk_CK = 0.0
        for h in range(key * copies, (key + 1) * copies):
            v_CV, do_CV = (x[0, :, h * V : (h + 1) * V] for x in (v_ref, do_ref))
            S_KV = states_ref[0, 0, h]
            c = tpu_head_decay.chunk(
                p, gates[h], plan.scale, qk_CC, kk_CC, lost_CC, k_CK, v_CV, S_KV
            )
            d = tpu_head_decay.backward(
                p, gates[h], plan.scale, qk_CC, kk_CC, c, q_CK, k_CK, S_KV, do_CV, dS_ref[h]
            )
            dS_ref[h] = d.dS_KV
            dv_ref[0, :, h * V : (h + 1) * V] = d.dv_CV.astype(dv_ref.dtype)
            dgates_ref[0, 0, 0, h : h + 1] = d.dbeta_1C
            if d.dg_1C is not None:
                dgates_ref[0, 0, 0, plan.heads + h : plan.heads + h + 1] = d.dg_1C
            dqk_CC, dkk_CC = dqk_CC + d.dqk_CC, dkk_CC + d.dkk_CC
            dq_CK, dk_CK = dq_CK + d.dq_CK, dk_CK + d.dk_CK
        dq_CK = dq_CK + p.coarse(dqk_CC, k_CK)
        dk_CK = dk_CK + p.coarse(dqk_CC, q_CK, (0, 0))
        dk_CK = dk_CK + p.coarse(dkk_CC, k_CK) + p.coarse(dkk_CC, k_CK, (0, 0))
        dq_ref[0, :, lanes] = dq_CK.astype(dq_ref.dtype)
        dk_ref[0, :, lanes] = dk_CK.astype(dk_ref.dtype)

    @pl.when(n == plan.chunks - 1)
    def _():
        dinitial_ref[0] = dS_ref[...]


def unsupported(*, q_BTGK, k_BTGK, v_BTHV, initial_state_BHKV, **others) -> str | None:
    """Why the kernels cannot run a call."""
    if initial_state_BHKV.dtype != jnp.float32:
        return (
            f"it computes in float32; the inputs ask for {initial_state_BHKV.dtype}: use 'chunked'"
        )
    if others.get("log_decay_BTHK") is not None and others["log_decay_BTHK"].shape[-1] > 1:
        return "no channel"
    return None
