"""Linear attention by its definition, one token at a time, which every other form must match."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import segments


def step(q_BHK, k_BHK, v_BHV, log_decay_BHK, state_BHKV):
    """Computes S <- diag(exp(g)) S + k v^T and o = S^T q for one token, without scale.

    log_decay_BHK: g, (B, H, K) or (B, H, 1), or None for no decay. Returns (o, S).
    """
    if log_decay_BHK is not None:
        state_BHKV = jnp.exp(log_decay_BHK)[..., None] * state_BHKV
    state_BHKV = state_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
    return jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV), state_BHKV


def recurrent(
    q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, scale=1.0
):
    """Computes linear attention token by token, in the state's dtype; returns (o, final state).

    `api.py` normalises the arguments; q and k have as many heads as v.
    """
    dtype = initial_state_BHKV.dtype

    def scan_step(state_BHKV, inputs):
        (q_BHK, k_BHK, v_BHV), log_decay_BHK, start_B = inputs
        if start_B is not None:
            state_BHKV = jnp.where(start_B[:, None, None, None], 0.0, state_BHKV)
        o_BHV, state_BHKV = step(q_BHK, k_BHK, v_BHV, log_decay_BHK, state_BHKV)
        return state_BHKV, o_BHV

    def time_first(x):
        return jnp.moveaxis(x, 1, 0)

    qkv = jax.tree.map(lambda x: time_first(x.astype(dtype)), (q_BTHK, k_BTHK, v_BTHV))
    log_decay_TBHK = None if log_decay_BTHK is None else time_first(log_decay_BTHK.astype(dtype))
    start_TB = None if segment_ids_BT is None else time_first(segments.starts(segment_ids_BT))
    final_BHKV, o_TBHV = jax.lax.scan(
        scan_step, initial_state_BHKV, (qkv, log_decay_TBHK, start_TB)
    )
    return jnp.moveaxis(scale * o_TBHV, 0, 1).astype(v_BTHV.dtype), final_BHKV
