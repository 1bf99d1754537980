"""The chunk algebra of linear attention in plain lines, to be read beside docs/math.

It computes what `chunked.py` computes, chunk after chunk and pair by pair of tokens, in
O(C^2 K) memory, and leaves the backward pass to JAX.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks, decay

CHUNK_SIZE = 16


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """Computes linear attention from normalised arguments, C tokens at a time; returns (o, S)."""
    T, H, C, dtype = *v_BTHV.shape[1:3], chunk_size or CHUNK_SIZE, initial_state_BHKV.dtype
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, H) for x in (q_BTGK, k_BTGK))
    g_BTHK = decay.per_channel(log_decay_BTHK, segment_ids_BT, k_BTHK.shape, dtype)

    def chunk(S_BHKV, inputs):
        q_BHCK, k_BHCK, v_BHCV, g_BHCK = inputs
        # D_ij = exp(g_{j+1} + ... + g_i), exp(g_cumsum) and exp(g_reversed)
        D_BHCCK = decay.naive_pair_decay(g_BHCK)
        exp_g_cumsum_BHCK = jnp.exp(jnp.cumsum(g_BHCK, axis=2))
        exp_g_reversed_BHCK = D_BHCCK[:, :, -1]
        # A_ij = q_i^T diag(D_ij) k_j
        A_BHCC = jnp.einsum("BHiK,BHijK,BHjK->BHij", q_BHCK, D_BHCCK, k_BHCK)
        # o = A v + (q exp(g_cumsum)) S
        o_BHCV = jnp.einsum("BHij,BHjV->BHiV", A_BHCC, v_BHCV)
        o_BHCV += jnp.einsum("BHiK,BHKV->BHiV", q_BHCK * exp_g_cumsum_BHCK, S_BHKV)
        # S' = diag(exp(g_total)) S + (k exp(g_reversed))^T v
        S_BHKV = exp_g_cumsum_BHCK[:, :, -1, :, None] * S_BHKV
        S_BHKV += jnp.einsum("BHjK,BHjV->BHKV", k_BHCK * exp_g_reversed_BHCK, v_BHCV)
        return S_BHKV, o_BHCV

    chunks = [chunk_blocks.to_chunks(x, C, dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK)]
    final_BHKV, o_NBHCV = jax.lax.scan(jax.checkpoint(chunk), initial_state_BHKV, chunks)
    o_BTHV = scale * chunk_blocks.from_chunks(o_NBHCV)[:, :T]
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV
