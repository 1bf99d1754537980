"""The delta rule by its definition, one token at a time, which every other form must match."""

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


def recurrent(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT):
    """Computes the delta rule token by token from normalised arguments; returns (o, state)."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH)
    return segments.recurrent(step, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT)


def recurrent_diagonal_plus_low_rank(
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
):
    """Computes diagonal plus low rank token by token, from normalised arguments; returns (o, S)."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    return segments.recurrent(
        step_diagonal_plus_low_rank, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
    )
