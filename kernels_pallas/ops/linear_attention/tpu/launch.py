"""Linear attention as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads. The steps of a sequence follow one another with the heads'
states in VMEM, and all of a chunk's algebra is inside the step (`tpu_head_decay.py`,
`tpu_channel_decay.py`): HBM sees each input and output once. Heads lie side by side in the lanes,
(B, T, H K), as projections leave them. A document's start is a reset.

For the backward pass the forward one also writes the state that enters each chunk, in the dtype
that the matrix unit reads: K V / C numbers a token and head, as many as q at K = V = C. Computing
the states again would cost a pass over k and v, which is two such arrays, and one product more a
chunk. The backward pass takes the chunks in reverse with the state's cotangent in VMEM.

Several value heads may share a key head. Then the steps of one chunk follow one another (the last
grid axis), the key head stays in VMEM between them, and its gradient is summed there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import decay, kernel_vjp, segments
from kernels_pallas.dispatch import devices, manual_axes
from kernels_pallas.ops.linear_attention import chunked
from kernels_pallas.ops.linear_attention.tpu.tiling import (
    VMEM_BYTES,
    Tiling,
    tiling_of,
    unsupported_reason,
)

__all__ = ["run", "unsupported_reason"]


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """The kernels. Arguments are normalised by `api.py`."""
    tiling = tiling_of(
        q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size=chunk_size, scale=scale
    )
    B, T, H, V = v_BTHV.shape
    K = k_BTGK.shape[3]
    if segment_ids_BT is not None:
        if log_decay_BTHK is None:
            log_decay_BTHK = jnp.zeros_like(v_BTHV, jnp.float32, (B, T, H, 1))
        starts_BT = segments.starts(segment_ids_BT)
        log_decay_BTHK = jnp.where(starts_BT[:, :, None, None], decay.RESET, log_decay_BTHK)
    q, k, v = (
        _flat(x.astype(tiling.dtype), tiling, width)
        for x, width in ((q_BTGK, tiling.K), (k_BTGK, tiling.K), (v_BTHV, tiling.V))
    )
    gates = None
    if tiling.decay == "per_token":
        g_BTH = _padded(log_decay_BTHK[..., 0], (0, tiling.T - T), axis=1)
        gates = g_BTH.transpose(0, 2, 1).reshape(B, H, tiling.chunks, 1, tiling.C)
    elif tiling.decay == "per_channel":
        gates = _flat(log_decay_BTHK, tiling, tiling.K)
    state = _padded(_padded(initial_state_BHKV, (0, tiling.K - K), 2), (0, tiling.V - V), 3)
    if tiling.decay == "per_channel":
        state = state.swapaxes(2, 3)
    o, final = _run(tiling, None, q, k, v, gates, state)
    o_BTHV = o.reshape(B, tiling.T, H, tiling.V)[:, :T, :, :V].astype(v_BTHV.dtype)
    if tiling.decay == "per_channel":
        final = final.swapaxes(2, 3)
    return o_BTHV, final[:, :, :K, :V]


def _padded(x, amount, axis):
    """x, and zeros around one axis: tokens that neither write nor decay, columns that no one reads."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = amount
    return jnp.pad(x, widths) if any(amount) else x


def _flat(x_BTHK, tiling, width):
    """(B, T, H, K) to (B, whole chunks, H * whole width)."""
    B, T, H, K = x_BTHK.shape
    x = _padded(x_BTHK, (0, width - K), 3).reshape(B, T, H * width)
    return _padded(x, (0, tiling.T - T), 1)


def _without_states(tiling, _, *arrays):
    return tuple(_forward(tiling, False, *arrays))


def _with_states(tiling, _, *arrays):
    o, final, states = _forward(tiling, True, *arrays)
    return (o, final), states


def _gradients(tiling, _, arrays, states, cotangents):
    return _backward(tiling, *arrays[:-1], states, *cotangents)


def _chunked(tiling, _, q, k, v, gates, state):
    B, T, G, H = tiling.B, tiling.T, tiling.G, tiling.H
    if tiling.decay == "per_token":
        gates = gates.reshape(B, H, T).swapaxes(1, 2)[..., None]
    elif tiling.decay == "per_channel":
        gates, state = gates.reshape(B, T, H, tiling.K), state.swapaxes(2, 3)
    q, k, v = (x.reshape(B, T, n, -1) for x, n in ((q, G), (k, G), (v, H)))
    o, final = chunked.run(q, k, v, gates, state, None, None, tiling.scale)
    return o.reshape(B, T, -1), final.swapaxes(2, 3) if tiling.decay == "per_channel" else final


_run = kernel_vjp.differentiable(_with_states, _gradients, _chunked, call=_without_states)


def _specs(tiling: Tiling, backward: bool) -> dict[str, pl.BlockSpec]:
    """Blocks by what they hold. Grid: rows, groups of heads, chunks (backward: from the last),
    steps of a group."""
    C, N, J = tiling.C, tiling.chunks, tiling.shared

    def at(n):
        return N - 1 - n if backward else n

    def first(b, x, n, j):
        """Fetched before the first chunk, then left alone."""
        return b, x * J + jnp.where(n == 0, j, J - 1), 0, 0

    def last(b, x, n, j):
        """Written behind the last chunk: until then the block stays where it is."""
        return b, x * J + jnp.where(n == N - 1, j, 0), 0, 0

    state = (tiling.heads, *tiling.state)
    gates = (1, tiling.heads, 1, 1, C), lambda b, x, n, j: (b, x * J + j, at(n), 0, 0)
    if tiling.decay == "per_channel":
        gates = (1, C, tiling.heads * tiling.K), lambda b, x, n, j: (b, at(n), x * J + j)
    return {
        "key": pl.BlockSpec((1, C, tiling.keys * tiling.K), lambda b, x, n, j: (b, at(n), x)),
        "value": pl.BlockSpec(
            (1, C, tiling.heads * tiling.V), lambda b, x, n, j: (b, at(n), x * J + j)
        ),
        "gates": pl.BlockSpec(*gates),
        "states": pl.BlockSpec((1, 1, *state), lambda b, x, n, j: (b, at(n), x * J + j, 0, 0)),
        "first": pl.BlockSpec((1, *state), first),
        "last": pl.BlockSpec((1, *state), last),
    }


def _call(tiling: Tiling, name, kernel, inputs, outputs, scratch):
    """inputs: (kind, array); outputs: (kind, shape, dtype); the chunk module's constants come in
    front."""
    specs = _specs(tiling, name == "backward")
    constants = tiling.chunk.constants(tiling, backward=name == "backward")
    fixed = [pl.BlockSpec(x.shape, lambda b, g, n, j, rank=x.ndim: (0,) * rank) for x in constants]
    given = [(kind, x) for kind, x in inputs if x is not None]
    operands = manual_axes.alike((*constants, *(x for _, x in given)))
    written = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
    return pl.pallas_call(
        functools.partial(kernel, tiling, len(constants)),
        grid=(tiling.B, tiling.H // (tiling.heads * tiling.shared), tiling.chunks, tiling.shared),
        in_specs=[*fixed, *(specs[kind] for kind, _ in given)],
        out_specs=[specs[kind] for kind, _, _ in outputs],
        out_shape=manual_axes.shapes(written, operands),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES + (8 << 20),
        ),
        interpret=devices.interpreting(),
        name=f"linear_attention_{tiling.decay}_decay_{name}",
    )(*operands)


def _forward(tiling: Tiling, keep: bool, q, k, v, gates, state):
    outputs = [("value", v.shape, v.dtype), ("last", state.shape, jnp.float32)]
    if keep:
        outputs.append(("states", (tiling.B, tiling.chunks, tiling.H, *tiling.state), tiling.dtype))
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("first", state)]
    scratch = [(tiling.shared, tiling.heads, *tiling.state)]
    return _call(tiling, "forward", _forward_kernel, inputs, outputs, scratch)


def _backward(tiling: Tiling, q, k, v, gates, states, d_o, d_final):
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("states", states)]
    inputs += [("value", d_o), ("first", d_final)]
    outputs = [("key", q.shape, q.dtype), ("key", k.shape, k.dtype), ("value", v.shape, v.dtype)]
    if gates is not None:
        outputs.append(("gates", gates.shape, gates.dtype))
    outputs.append(("last", d_final.shape, jnp.float32))
    scratch = [(tiling.shared, tiling.heads, *tiling.state)]
    if tiling.shared > 1:
        scratch += [(tiling.C, tiling.keys * tiling.K)] * 2
    d_q, d_k, d_v, *d_gates, d_state = _call(
        tiling, "backward", _backward_kernel, inputs, outputs, scratch
    )
    return d_q, d_k, d_v, d_gates[0] if d_gates else None, d_state


def _lanes(ref, h, width):
    return ref[0, :, h * width : (h + 1) * width]


def _gates(tiling, refs, h):
    """One head's gates: None, a row (1, C), or (C, K)."""
    if tiling.decay == "none":
        return None
    return refs[0][0, h, 0] if tiling.decay == "per_token" else _lanes(refs[0], h, tiling.K)


def _forward_kernel(tiling: Tiling, fixed: int, *refs):
    constants, (q_ref, k_ref, v_ref, *refs) = refs[:fixed], refs[fixed:]
    gates_ref, refs = (refs[:1], refs[1:]) if tiling.decay != "none" else ((), refs)
    first_ref, o_ref, last_ref, *states_ref, S_ref = refs
    n, j = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        S_ref[j] = first_ref[0]

    for x in range(tiling.keys):
        q_CK, k_CK = (_lanes(ref, x, tiling.K) for ref in (q_ref, k_ref))
        shared = tiling.chunk.shared(tiling, q_CK, k_CK)
        copies = tiling.heads // tiling.keys
        for h in range(x * copies, (x + 1) * copies):
            S = S_ref[j, h]
            if states_ref:
                states_ref[0][0, 0, h] = S.astype(tiling.dtype)
            o_CV, S_ref[j, h] = tiling.chunk.forward(
                tiling,
                constants,
                q_CK,
                k_CK,
                shared,
                _lanes(v_ref, h, tiling.V),
                _gates(tiling, gates_ref, h),
                S,
            )
            o_ref[0, :, h * tiling.V : (h + 1) * tiling.V] = o_CV.astype(o_ref.dtype)

    @pl.when(n == tiling.chunks - 1)
    def _():
        last_ref[0] = S_ref[j]


def _backward_kernel(tiling: Tiling, fixed: int, *refs):
    constants, (q_ref, k_ref, v_ref, *refs) = refs[:fixed], refs[fixed:]
    gates_ref, refs = (refs[:1], refs[1:]) if tiling.decay != "none" else ((), refs)
    states_ref, d_o_ref, first_ref, d_q_ref, d_k_ref, d_v_ref, *refs = refs
    d_gates_ref, refs = (refs[:1], refs[1:]) if tiling.decay != "none" else ((), refs)
    last_ref, d_S_ref, *sums_ref = refs
    n, j = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        d_S_ref[j] = first_ref[0]

    for x in range(tiling.keys):
        q_CK, k_CK = (_lanes(ref, x, tiling.K) for ref in (q_ref, k_ref))
        shared = tiling.chunk.shared(tiling, q_CK, k_CK)
        copies = tiling.heads // tiling.keys
        d_q_CK = d_k_CK = None
        for h in range(x * copies, (x + 1) * copies):
            d = tiling.chunk.backward(
                tiling,
                constants,
                q_CK,
                k_CK,
                shared,
                _lanes(v_ref, h, tiling.V),
                _gates(tiling, gates_ref, h),
                states_ref[0, 0, h],
                _lanes(d_o_ref, h, tiling.V),
                d_S_ref[j, h],
            )
            d_v_ref[0, :, h * tiling.V : (h + 1) * tiling.V] = d.v.astype(d_v_ref.dtype)
            if tiling.decay == "per_token":
                d_gates_ref[0][0, h, 0] = d.gates
            elif tiling.decay == "per_channel":
                d_gates_ref[0][0, :, h * tiling.K : (h + 1) * tiling.K] = d.gates
            d_S_ref[j, h] = d.S
            d_q_CK, d_k_CK = (d.q, d.k) if d_q_CK is None else (d_q_CK + d.q, d_k_CK + d.k)
        lanes = slice(x * tiling.K, (x + 1) * tiling.K)
        _write_key_gradients(tiling, lanes, (d_q_ref, d_k_ref), sums_ref, (d_q_CK, d_k_CK))

    @pl.when(n == tiling.chunks - 1)
    def _():
        last_ref[0] = d_S_ref[j]


def _write_key_gradients(tiling, lanes, refs, sums_refs, gradients):
    """A key head's gradients; where several steps share it, their sum, in float32, behind the last."""
    if tiling.shared == 1:
        for ref, d in zip(refs, gradients):
            ref[0, :, lanes] = d.astype(ref.dtype)
        return
    j = pl.program_id(3)
    for ref, sum_ref, d in zip(refs, sums_refs, gradients):
        d = d + jnp.where(j == 0, 0.0, sum_ref[:, lanes])
        sum_ref[:, lanes] = d
        ref[0, :, lanes] = d.astype(ref.dtype)
