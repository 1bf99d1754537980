"""The delta rule by its definition, one token at a time, which every other form must match."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import segments


def step(q_BHK, k_BHK, v_BHV, beta_BH, log_decay_BHK, state_BHKV):
    """Computes S <- diag(exp(g)) S, S <- S + beta k (v - S^T k)^T, o = S^T q; returns (o, S)."""
    if log_decay_BHK is not None:
        state_BHKV = jnp.exp(log_decay_BHK)[..., None] * state_BHKV
    error_BHV = v_BHV - jnp.einsum("BHK,BHKV->BHV", k_BHK, state_BHKV)
    state_BHKV = state_BHKV + (beta_BH[..., None] * k_BHK)[..., :, None] * error_BHV[..., None, :]
    return jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV), state_BHKV


def step_diagonal_plus_low_rank(q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, log_decay_BHK, state_BHKV):
    """Computes S <- diag(exp(g)) S + a (S^T b)^T + k v^T, o = S^T q; b reads S before the decay."""
    read_BHV = jnp.einsum("BHK,BHKV->BHV", b_BHK, state_BHKV)
    if log_decay_BHK is not None:
        state_BHKV = jnp.exp(log_decay_BHK)[..., None] * state_BHKV
    state_BHKV = state_BHKV + a_BHK[..., :, None] * read_BHV[..., None, :]
    state_BHKV = state_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
    return jnp.einsum("BHK,BHKV->BHV", q_BHK, state_BHKV), state_BHKV


def _scan(one_step, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT):
    """Scans one_step, the recurrence of one token, over inputs (B, T, H, ...), v the third."""
    dtype = initial_state_BHKV.dtype

    def scan_step(state_BHKV, step_inputs):
        arrays, log_decay_BHK, start_B = step_inputs
        if start_B is not None:
            state_BHKV = jnp.where(start_B[:, None, None, None], 0.0, state_BHKV)
        o_BHV, state_BHKV = one_step(*arrays, log_decay_BHK, state_BHKV)
        return state_BHKV, o_BHV

    def time_first(x):
        return jnp.moveaxis(x, 1, 0)

    arrays = jax.tree.map(lambda x: time_first(x.astype(dtype)), inputs)
    log_decay_TBHK = None if log_decay_BTHK is None else time_first(log_decay_BTHK.astype(dtype))
    start_TB = None if segment_ids_BT is None else time_first(segments.starts(segment_ids_BT))
    final_BHKV, o_TBHV = jax.lax.scan(
        scan_step, initial_state_BHKV, (arrays, log_decay_TBHK, start_TB)
    )
    v_BTHV = inputs[2]
    return jnp.moveaxis(o_TBHV, 0, 1).astype(v_BTHV.dtype), final_BHKV


def recurrent(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT):
    """Computes the delta rule token by token from normalised arguments; returns (o, state)."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH)
    return _scan(step, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT)


def recurrent_diagonal_plus_low_rank(
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
):
    """Computes diagonal plus low rank token by token, from normalised arguments; returns (o, S)."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    return _scan(
        step_diagonal_plus_low_rank, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
    )
