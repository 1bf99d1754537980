"""Arguments of the matrix recurrences in the layout of the TPU kernels, and the kernels' custom
VJP, for linear attention and the delta rule.

Kernels read (B, chunks * C, heads * dim): heads lie side by side in the lanes, as projections leave
them. For the backward pass the forward kernel also writes the state that enters each chunk.
"""

import jax.numpy as jnp

from kernels_pallas.common import kernel_vjp
from kernels_pallas.tpu.tiling import RecurrenceTiling


def pad_end(x, amounts: dict[int, int]):
    """Appends zeros to x: `amounts[axis]` at the end of each axis named. Zeros are tokens that
    neither write nor decay the state, or channels that are never read."""
    widths = [(0, amounts.get(axis, 0)) for axis in range(x.ndim)]
    return jnp.pad(x, widths) if any(amounts.values()) else x


def pad_tokens(x_BT, tiling: RecurrenceTiling):
    """Pads an array (B, T, ...) with zeros to a whole number of chunks."""
    return pad_end(x_BT, {1: tiling.chunks * tiling.C - tiling.T})


def flatten(x_BTHK, tiling: RecurrenceTiling, width: int, dtype):
    """Reshapes (B, T, H, K) to (B, chunks * C, H * width) in `dtype`, padded with zeros."""
    x_BTHK = pad_end(pad_tokens(x_BTHK.astype(dtype), tiling), {3: width - x_BTHK.shape[3]})
    return x_BTHK.reshape(*x_BTHK.shape[:2], -1)


def flat_inputs(tiling: RecurrenceTiling, q_BTGK, k_BTGK, v_BTHV, state_BHKV):
    """Returns q, k, v and the initial state in the layout of the TPU kernels. q, k and v become (B,
    chunks * C, heads * dim); the state, padded, is float32."""
    q, k = (flatten(x, tiling, tiling.K, tiling.dtype) for x in (q_BTGK, k_BTGK))
    K, V = state_BHKV.shape[2:]
    state = pad_end(state_BHKV.astype(jnp.float32), {2: tiling.K - K, 3: tiling.V - V})
    return q, k, flatten(v_BTHV, tiling, tiling.V, tiling.dtype), state


def outputs(tiling: RecurrenceTiling, o, final_BHKV, v_BTHV, K: int):
    """Returns o (B, T, H, V), in v's dtype, and the final state (B, H, K, V), both without padding.
    o: the kernels' flat output. K: the call's key channels."""
    T, V = tiling.T, v_BTHV.shape[3]
    o_BTHV = o.reshape(tiling.B, -1, tiling.H, tiling.V)[:, :T, :, :V]
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV[:, :, :K, :V]


def apart(tiling: RecurrenceTiling, q, k, v):
    """Separates the heads of the flat q, k and v: (B, T, heads * dim) to (B, T, heads, dim)."""
    heads = (tiling.G, tiling.G, tiling.H)
    return (x.reshape(*x.shape[:2], n, -1) for x, n in zip((q, k, v), heads))


def differentiable(forward, backward, plain):
    """Returns run(tiling, None, *arrays) -> (o, final state), with derivatives of any order.

    The last array is the initial state.

    Args:
      forward: (tiling, keep, *arrays) -> (o, final state), and if `keep` also the states that enter
        the chunks.
      backward: (tiling, *arrays without the initial state, states, do, dfinal) -> the gradients of
        all arrays.
      plain: (tiling, None, *arrays) -> (o, final state) by the chunked form, for derivatives of
        higher order.
    """

    def without_states(tiling, _, *arrays):
        return tuple(forward(tiling, False, *arrays))

    def with_states(tiling, _, *arrays):
        o, final, states = forward(tiling, True, *arrays)
        return (o, final), states

    def gradients(tiling, _, arrays, states, cotangents):
        return backward(tiling, *arrays[:-1], states, *cotangents)

    return kernel_vjp.differentiable(with_states, gradients, plain, call=without_states)
