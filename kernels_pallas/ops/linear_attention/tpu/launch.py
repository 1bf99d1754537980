"""Linear attention as Mosaic TPU kernels, forward and backward.

A grid step is one chunk of some heads. The steps of a sequence follow one another with the heads'
states in VMEM, and all of a chunk's algebra is inside the step (`per_token.py`, `per_channel.py`):
HBM sees each input and output once. A document's start is a reset.

The forward pass writes the state that enters each chunk in the dtype that the matrix unit reads:
K V / C numbers per token and head, as many as q at K = V = C. Computing the states again would cost
a pass over k and v, which is two such arrays, and one more product per chunk. The backward pass
takes the chunks in reverse with the state's cotangent in VMEM.

Several value heads may share a key head. Then the steps of one chunk follow one another (the last
grid axis), the key head stays in VMEM between them, and its gradient is summed there.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.common import decay
from kernels_pallas.dispatch import manual_axes
from kernels_pallas.ops.linear_attention import chunked
from kernels_pallas.ops.linear_attention.tpu import per_channel, per_token
from kernels_pallas.ops.linear_attention.tpu.tiling import Tiling, tiling_of, unsupported_reason
from kernels_pallas.tpu import tiling as tpu_tiling
from kernels_pallas.tpu import vjp

__all__ = ["run", "unsupported_reason"]


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """Computes linear attention by the TPU kernels, for arguments normalised by `api.py`. Returns o
    (B, T, H, V) and the final state (B, H, K, V)."""
    tiling = tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale)
    g_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, jnp.float32, tiling.H)
    q, k, v, state = vjp.flat_inputs(tiling, q_BTGK, k_BTGK, v_BTHV, initial_state_BHKV)
    gates = None
    if tiling.decay == "per_token":
        g_BHT = vjp.pad_tokens(g_BTHK[..., 0], tiling).transpose(0, 2, 1)
        gates = g_BHT.reshape(tiling.B, tiling.H, tiling.chunks, 1, tiling.C)
    elif tiling.per_channel:
        gates = vjp.flatten(g_BTHK, tiling, tiling.K, g_BTHK.dtype)
        state = state.swapaxes(2, 3)
    o, final = _run(tiling, None, q, k, v, gates, state)
    if tiling.per_channel:
        final = final.swapaxes(2, 3)
    return vjp.outputs(tiling, o, final, v_BTHV, q_BTGK.shape[3])


def _plain(tiling: Tiling, _, q, k, v, gates, state):
    B, T, H = *v.shape[:2], tiling.H
    if tiling.decay == "per_token":
        gates = gates.reshape(B, H, T).swapaxes(1, 2)[..., None]
    elif tiling.per_channel:
        gates, state = gates.reshape(B, T, H, tiling.K), state.swapaxes(2, 3)
    q, k, v = vjp.apart(tiling, q, k, v)
    o, final = chunked.run(q, k, v, gates, state, None, None, tiling.scale)
    return o.reshape(B, T, -1), final.swapaxes(2, 3) if tiling.per_channel else final


def _specs(tiling: Tiling, backward: bool) -> dict[str, pl.BlockSpec]:
    """Returns the kernels' block specs by kind of block, such as "key" or "states".

    Grid: rows of the batch, groups of steps that share key heads, chunks (backward: from the last),
      the steps of a group.
    """
    C, N, J = tiling.C, tiling.chunks, tiling.shared

    def at(n):
        return N - 1 - n if backward else n

    def first(b, x, n, j):
        """Indexes a block of the state that the walk over chunks starts from, fetched once."""
        return b, x * J + jnp.where(n == 0, j, J - 1), 0, 0

    def last(b, x, n, j):
        """Indexes a block of the state that the walk over chunks ends with, written once."""
        return b, x * J + jnp.where(n == N - 1, j, 0), 0, 0

    state = (tiling.heads, *tiling.state_shape)
    gates = (1, tiling.heads, 1, 1, C), lambda b, x, n, j: (b, x * J + j, at(n), 0, 0)
    if tiling.per_channel:
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


def _launch(tiling: Tiling, name, kernel, inputs, outputs, scratch):
    """Launches the kernel called `name`, "forward" or "backward", and returns its outputs.

    inputs, outputs: (kind of block in `_specs`, array or shape and dtype) pairs; those of None are
      left out. The constants of the chunk's equations come before the inputs.
    """
    specs = _specs(tiling, name == "backward")
    constants = _algebra(tiling).constants(tiling, backward=name == "backward")
    fixed = [pl.BlockSpec(x.shape, lambda b, x, n, j, rank=x.ndim: (0,) * rank) for x in constants]
    kinds, arrays = zip(*((kind, x) for kind, x in inputs if x is not None))
    arrays = manual_axes.alike((*constants, *arrays))
    return tpu_tiling.launch(
        functools.partial(kernel, tiling, len(constants)),
        f"linear_attention_{tiling.decay}_decay_{name}",
        (tiling.B, tiling.groups // tiling.shared, tiling.chunks, tiling.shared),
        list(zip((*fixed, *(specs[kind] for kind in kinds)), arrays)),
        [(specs[kind], x) for kind, x in outputs if x is not None],
        scratch,
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    )


def _forward(tiling: Tiling, keep: bool, q, k, v, gates, state):
    """Launches the forward kernel; returns o and the final state. keep: also returns the states
    that enter the chunks, for the backward pass."""
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("first", state)]
    states = (tiling.B, tiling.chunks, tiling.H, *tiling.state_shape)
    states = jax.ShapeDtypeStruct(states, tiling.dtype) if keep else None
    outputs = [("value", v), ("last", state), ("states", states)]
    scratch = [(tiling.shared, tiling.heads, *tiling.state_shape)]
    return _launch(tiling, "forward", _forward_kernel, inputs, outputs, scratch)


def _backward(tiling: Tiling, q, k, v, gates, states, do, dfinal):
    inputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("states", states)]
    inputs += [("value", do), ("first", dfinal)]
    outputs = [("key", q), ("key", k), ("value", v), ("gates", gates), ("last", dfinal)]
    scratch = [(tiling.shared, tiling.heads, *tiling.state_shape)]
    if tiling.shared > 1:
        scratch += [(tiling.C, tiling.keys * tiling.K)] * 2
    dq, dk, dv, *dgates, dstate = _launch(
        tiling, "backward", _backward_kernel, inputs, outputs, scratch
    )
    return dq, dk, dv, dgates[0] if dgates else None, dstate


_run = vjp.differentiable(_forward, _backward, _plain)


def _algebra(tiling):
    """Returns the module that computes a chunk: per_channel or per_token, as the decay is."""
    return per_channel if tiling.per_channel else per_token


def _lanes(h, width):
    return slice(h * width, (h + 1) * width)


def _head(ref, h, width):
    return ref[0, :, _lanes(h, width)]


def _gates(tiling, refs, h):
    """Reads the log decay of head h in a chunk: (1, C) per token, (C, K) per channel, else None."""
    if tiling.decay == "none":
        return None
    return _head(refs[0], h, tiling.K) if tiling.per_channel else refs[0][0, h, 0]


def _forward_kernel(tiling: Tiling, fixed: int, *refs):
    constants, (q_ref, k_ref, v_ref, *refs) = refs[:fixed], refs[fixed:]
    gates_ref, refs = (refs[:1], refs[1:]) if tiling.decay != "none" else ((), refs)
    first_ref, o_ref, last_ref, *states_ref, S_ref = refs
    n, j = pl.program_id(2), pl.program_id(3)
    algebra = _algebra(tiling)

    @pl.when(n == 0)
    def _():
        S_ref[j] = first_ref[0]

    for x in range(tiling.keys):
        # q k^T serves every value head of this key head.
        q_CK, k_CK = (_head(ref, x, tiling.K) for ref in (q_ref, k_ref))
        qk_CC = tiling.products.rounded(q_CK, k_CK, (1, 1))
        for h in range(x * tiling.copies, (x + 1) * tiling.copies):
            S = S_ref[j, h]
            if states_ref:
                states_ref[0][0, 0, h] = S.astype(tiling.dtype)
            v_CV, g = _head(v_ref, h, tiling.V), _gates(tiling, gates_ref, h)
            o_CV, S_ref[j, h] = algebra.forward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g, S)
            o_ref[0, :, _lanes(h, tiling.V)] = o_CV.astype(o_ref.dtype)

    @pl.when(n == tiling.chunks - 1)
    def _():
        last_ref[0] = S_ref[j]


def _backward_kernel(tiling: Tiling, fixed: int, *refs):
    constants, (q_ref, k_ref, v_ref, *refs) = refs[:fixed], refs[fixed:]
    gates_ref, refs = (refs[:1], refs[1:]) if tiling.decay != "none" else ((), refs)
    states_ref, do_ref, dfinal_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    dgates_ref: Any = ()
    if tiling.decay != "none":
        dgates_ref, refs = refs[:1], refs[1:]
    dinitial_ref, dS_ref, *sums_ref = refs
    n, j = pl.program_id(2), pl.program_id(3)
    algebra = _algebra(tiling)

    @pl.when(n == 0)
    def _():
        dS_ref[j] = dfinal_ref[0]

    for x in range(tiling.keys):
        q_CK, k_CK = (_head(ref, x, tiling.K) for ref in (q_ref, k_ref))
        qk_CC = tiling.products.rounded(q_CK, k_CK, (1, 1))
        dq_CK = dk_CK = cast(Any, None)
        for h in range(x * tiling.copies, (x + 1) * tiling.copies):
            v_CV, g = _head(v_ref, h, tiling.V), _gates(tiling, gates_ref, h)
            S, do_CV, dS = states_ref[0, 0, h], _head(do_ref, h, tiling.V), dS_ref[j, h]
            d = algebra.backward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g, S, do_CV, dS)
            dv_ref[0, :, _lanes(h, tiling.V)] = d.v.astype(dv_ref.dtype)
            if tiling.decay == "per_token":
                dgates_ref[0][0, h, 0] = d.g
            elif tiling.per_channel:
                dgates_ref[0][0, :, _lanes(h, tiling.K)] = d.g
            dS_ref[j, h] = d.S
            dq_CK, dk_CK = (d.q, d.k) if dq_CK is None else (dq_CK + d.q, dk_CK + d.k)
        lanes = _lanes(x, tiling.K)
        _write_key_gradients(tiling, lanes, (dq_ref, dk_ref), sums_ref, (dq_CK, dk_CK))

    @pl.when(n == tiling.chunks - 1)
    def _():
        dinitial_ref[0] = dS_ref[j]


def _write_key_gradients(tiling, lanes, refs, sums_refs, gradients):
    """Writes dq and dk of one key head to its `lanes` of the output blocks `refs`.

    If several grid steps share the head, each writes the float32 sum so far, kept in `sums_refs`;
    the last one's is complete.
    """
    if tiling.shared == 1:
        for ref, d in zip(refs, gradients):
            ref[0, :, lanes] = d.astype(ref.dtype)
        return
    j = pl.program_id(3)
    for ref, sum_ref, d in zip(refs, sums_refs, gradients):
        d = d + jnp.where(j == 0, 0.0, sum_ref[:, lanes])
        sum_ref[:, lanes] = d
        ref[0, :, lanes] = d.astype(ref.dtype)
