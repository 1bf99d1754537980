"""The chunk algebra of sums over documents in plain lines, to be read beside docs/math.

It computes what `chunked.py` computes, chunk after chunk, once from the left and once from the
right, and leaves the backward pass to JAX.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks
from kernels_pallas.ops.document_sums import reference

CHUNK_SIZE = 16


def run(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    initial_state_BHKV,
    segment_ids_BT,
    block_ids_BT,
    block_size,
    chunk_size,
    scale,
):
    """Computes sums over documents from normalised arguments, by C tokens; returns (o, S)."""
    T, H, C, dtype = *v_BTHV.shape[1:3], chunk_size or CHUNK_SIZE, initial_state_BHKV.dtype
    document_BT, block_BT = reference.runs(v_BTHV, segment_ids_BT, block_ids_BT, block_size)
    q, k = (arguments.repeat_heads(x, H) for x in (q_BTGK, k_BTGK))
    qkv = [chunk_blocks.to_chunks(x, C, dtype) for x in (q, k, v_BTHV)]

    def edges(run_BT):
        """Returns the runs of each chunk's tokens 0 to C + 1: the one before, its own, the next."""
        run_BT = jnp.pad(run_BT, ((0, 0), (1, -T % C + 1)), mode="edge")
        starts_N = jnp.arange(-(-T // C)) * C
        return run_BT.T[starts_N[:, None] + jnp.arange(C + 2)[None]].swapaxes(1, 2)

    def same(x_B, y_BC):
        return (x_B[:, None] == y_BC)[:, None, :, None]

    def from_left(P_BHKV, inputs):
        (q_BHCK, k_BHCK, v_BHCV), left_BX, right_BX = inputs
        left_BC, right_BC = left_BX[:, 1:-1], right_BX[:, 1:-1]
        # A_ij = M_ij q_i^T k_j
        same_left, same_right = (x[:, :, None] == x[:, None] for x in (left_BC, right_BC))
        M_BCC = jnp.where(jnp.tri(C, dtype=bool)[None], same_left, same_right)
        A_BHCC = jnp.einsum("BHiK,BHjK->BHij", q_BHCK, k_BHCK) * M_BCC[:, None]
        # o = A v + [l_i = l_0] P^T q
        o_BHCV = jnp.einsum("BHij,BHjV->BHiV", A_BHCC, v_BHCV)
        o_BHCV += jnp.einsum("BHiK,BHKV->BHiV", same(left_BX[:, 0], left_BC) * q_BHCK, P_BHKV)
        # P' = [l_0 = l_C] P + sum_j [l_j = l_C] k_j v_j^T
        P_BHKV *= same(left_BX[:, 0], left_BC[:, -1:])
        kept_BHCK = same(left_BC[:, -1], left_BC) * k_BHCK
        return P_BHKV + jnp.einsum("BHjK,BHjV->BHKV", kept_BHCK, v_BHCV), o_BHCV

    def from_right(Q_BHKV, inputs):
        (q_BHCK, k_BHCK, v_BHCV), right_BX = inputs
        right_BC = right_BX[:, 1:-1]
        # o += [r_i = r_{C+1}] Q^T q
        read_BHCK = same(right_BX[:, -1], right_BC) * q_BHCK
        o_BHCV = jnp.einsum("BHiK,BHKV->BHiV", read_BHCK, Q_BHKV)
        # Q' = [r_{C+1} = r_1] Q + sum_j [r_j = r_1] k_j v_j^T
        Q_BHKV *= same(right_BX[:, -1], right_BC[:, :1])
        kept_BHCK = same(right_BC[:, 0], right_BC) * k_BHCK
        return Q_BHKV + jnp.einsum("BHjK,BHjV->BHKV", kept_BHCK, v_BHCV), o_BHCV

    left_NBX, right_NBX = edges(document_BT), edges(block_BT)
    final_BHKV, o_NBHCV = jax.lax.scan(
        jax.checkpoint(from_left), initial_state_BHKV, (qkv, left_NBX, right_NBX)
    )
    zero_BHKV = jnp.zeros_like(initial_state_BHKV)
    _, more_NBHCV = jax.lax.scan(
        jax.checkpoint(from_right), zero_BHKV, (qkv, right_NBX), reverse=True
    )
    o_BTHV = scale * chunk_blocks.from_chunks(o_NBHCV + more_NBHCV)[:, :T]
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV
