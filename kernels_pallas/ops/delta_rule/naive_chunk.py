"""The chunk algebra of the delta rule and of diagonal plus low rank, to be read beside docs/math.

It computes what `chunked.py` computes, chunk after chunk and pair by pair of tokens, in O(C^2 K)
memory, and leaves the backward pass to JAX. Where beta is 2 a state forgets nothing, rounding
errors included, so the written vectors U are refined once, and products that make states are
rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from kernels_pallas.common import arguments, chunk_blocks, decay, segments
from kernels_pallas.ops.delta_rule.compensated import rounded_once

CHUNK_SIZE = 32
_unit_lower_solve = functools.partial(solve_triangular, lower=True, unit_diagonal=True)


def run(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT,
    chunk_size=None, scale=1.0,
):  # fmt: skip
    """Computes the delta rule from normalised arguments, C tokens at a time; returns (o, state)."""
    T, H, C, dtype = *v_BTHV.shape[1:3], chunk_size or CHUNK_SIZE, initial_state_BHKV.dtype
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, H) for x in (q_BTGK, k_BTGK))
    g_BTHK = decay.per_channel(log_decay_BTHK, segment_ids_BT, k_BTHK.shape, dtype)
    earlier_11CC1 = jnp.tri(C, k=-1, dtype=dtype)[None, None, ..., None]

    def chunk(S_BHKV, inputs):
        q_BHCK, k_BHCK, v_BHCV, beta_BHC1, g_BHCK = inputs
        # D_ij = exp(g_{j+1} + ... + g_i), exp(g_cumsum) and exp(g_reversed)
        D_BHCCK = decay.naive_pair_decay(g_BHCK)
        exp_g_cumsum_BHCK = jnp.exp(jnp.cumsum(g_BHCK, axis=2))
        exp_g_reversed_BHCK = D_BHCCK[:, :, -1]
        # A_ij = beta_i k_i^T diag(D_ij) k_j
        A_BHCC = beta_BHC1 * jnp.einsum("BHiK,BHijK,BHjK->BHij", k_BHCK, D_BHCCK, k_BHCK)
        # (I + A) U = R = beta v - (beta k exp(g_cumsum)) S
        read_BHCV = jnp.einsum("BHiK,BHKV->BHiV", k_BHCK * exp_g_cumsum_BHCK, S_BHKV)
        U_BHCV = _unit_lower_solve(A_BHCC, beta_BHC1 * (v_BHCV - read_BHCV))
        # Refined once by the definition, U_i = beta_i (v_i - k_i^T S_i), S_i what token i finds
        kU_BHCKV = k_BHCK[..., None] * U_BHCV[..., None, :]
        S_BHCKV = jnp.einsum("BHijK,BHjKV->BHiKV", D_BHCCK * earlier_11CC1, kU_BHCKV)
        S_BHCKV += exp_g_cumsum_BHCK[..., None] * S_BHKV[:, :, None]
        read_BHCV = rounded_once("BHiZK,BHiKV->BHiZV", k_BHCK[:, :, :, None], S_BHCKV)[..., 0, :]
        U_BHCV += _unit_lower_solve(A_BHCC, beta_BHC1 * (v_BHCV - read_BHCV) - U_BHCV)
        # Z_ij = q_i^T diag(D_ij) k_j, o = (q exp(g_cumsum)) S + Z U
        Z_BHCC = jnp.einsum("BHiK,BHijK,BHjK->BHij", q_BHCK, D_BHCCK, k_BHCK)
        o_BHCV = jnp.einsum("BHiK,BHKV->BHiV", q_BHCK * exp_g_cumsum_BHCK, S_BHKV)
        o_BHCV += jnp.einsum("BHij,BHjV->BHiV", Z_BHCC, U_BHCV)
        # S' = diag(exp(g_total)) S + (k exp(g_reversed))^T U
        S_BHKV = exp_g_cumsum_BHCK[:, :, -1, :, None] * S_BHKV
        S_BHKV += rounded_once("BHjK,BHjV->BHKV", k_BHCK * exp_g_reversed_BHCK, U_BHCV)
        return S_BHKV, o_BHCV

    inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g_BTHK
    chunks = [chunk_blocks.to_chunks(x, C, dtype) for x in inputs]
    final_BHKV, o_NBHCV = jax.lax.scan(jax.checkpoint(chunk), initial_state_BHKV, chunks)
    return (scale * chunk_blocks.from_chunks(o_NBHCV)[:, :T]).astype(v_BTHV.dtype), final_BHKV


def run_diagonal_plus_low_rank(
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT,
    chunk_size=None,
):  # fmt: skip
    """Computes diagonal plus low rank from normalised arguments, C tokens at a time."""
    T, C, dtype = v_BTHV.shape[1], chunk_size or CHUNK_SIZE, initial_state_BHKV.dtype
    g_BTHK = decay.per_channel(log_decay_BTHK, segment_ids_BT, k_BTHK.shape, dtype)
    if segment_ids_BT is not None:  # a document's first token reads nothing
        b_BTHK = jnp.where(segments.starts(segment_ids_BT)[:, :, None, None], 0.0, b_BTHK)

    def chunk(S_BHKV, inputs):
        q_BHCK, k_BHCK, v_BHCV, a_BHCK, b_BHCK, g_BHCK = inputs
        # D_ij and D_{i-1,j}; exp(g_cumsum) and, for b, which reads before the decay, g_exclusive
        D_BHCCK = decay.naive_pair_decay(g_BHCK)
        D_exclusive_BHCCK = decay.naive_pair_decay(g_BHCK, exclusive=True)
        exp_g_cumsum_BHCK = jnp.exp(jnp.cumsum(g_BHCK, axis=2))
        exp_g_exclusive_BHCK = jnp.roll(exp_g_cumsum_BHCK, 1, axis=2).at[:, :, 0].set(1)
        # A_ij = -b_i^T diag(D_{i-1,j}) a_j, A'_ij = b_i^T diag(D_{i-1,j}) k_j
        A_BHCC, A_prime_BHCC = (
            jnp.einsum("BHiK,BHijK,BHjK->BHij", b_BHCK, D_exclusive_BHCCK, x)
            for x in (-a_BHCK, k_BHCK)
        )
        # (I + A) U = A' v + (b exp(g_exclusive)) S
        R_BHCV = jnp.einsum("BHij,BHjV->BHiV", A_prime_BHCC, v_BHCV)
        R_BHCV += jnp.einsum("BHiK,BHKV->BHiV", b_BHCK * exp_g_exclusive_BHCK, S_BHKV)
        U_BHCV = _unit_lower_solve(A_BHCC, R_BHCV)
        # o = (q exp(g_cumsum)) S + (q . D a) U + (q . D k) v
        # S' = diag(exp(g_total)) S + (a exp(g_reversed))^T U + (k exp(g_reversed))^T v
        o_BHCV = jnp.einsum("BHiK,BHKV->BHiV", q_BHCK * exp_g_cumsum_BHCK, S_BHKV)
        S_BHKV = exp_g_cumsum_BHCK[:, :, -1, :, None] * S_BHKV
        for x_BHCK, y_BHCV in ((a_BHCK, U_BHCV), (k_BHCK, v_BHCV)):
            Z_BHCC = jnp.einsum("BHiK,BHijK,BHjK->BHij", q_BHCK, D_BHCCK, x_BHCK)
            o_BHCV += jnp.einsum("BHij,BHjV->BHiV", Z_BHCC, y_BHCV)
            S_BHKV += jnp.einsum("BHjK,BHjV->BHKV", D_BHCCK[:, :, -1] * x_BHCK, y_BHCV)
        return S_BHKV, o_BHCV

    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, g_BTHK
    chunks = [chunk_blocks.to_chunks(x, C, dtype) for x in inputs]
    final_BHKV, o_NBHCV = jax.lax.scan(jax.checkpoint(chunk), initial_state_BHKV, chunks)
    return chunk_blocks.from_chunks(o_NBHCV)[:, :T].astype(v_BTHV.dtype), final_BHKV
