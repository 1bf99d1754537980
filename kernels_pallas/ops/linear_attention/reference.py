"""Linear attention by its definition, one token at a time, which every other form must match."""

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
    inputs = (q_BTHK, k_BTHK, v_BTHV)
    return segments.recurrent(
        step, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, scale
    )
