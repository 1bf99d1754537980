"""Keeps NaN and Inf to the queries that see them: masking by a product with 0 passes them on."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import branches, chunk_blocks, matmul

BLOCK_SIZE = 128


def isolated(attend, *, one_query=False):
    """Wraps an attention function so that NaN and Inf reach exactly the queries that see them.

    An output is NaN where its query, or a key or value that it sees, is not finite. Gradients are
    those of the other outputs. It costs a pass over q, k and v, so that calls with one query (a
    decoding step, which reads them once) go without unless `one_query`.
    """

    def call(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
        if q_BTHK.shape[1] == 1 and not one_query:
            return attend(q_BTHK, k_BSGK, v_BSGV, visibility, scale)
        (q_BTHK, bad_BTH), (k_BSGK, bad_BSG), (v_BSGV, bad_v_BSG) = map(
            matmul.cleared, (q_BTHK, k_BSGK, v_BSGV)
        )
        o_BTHV = attend(q_BTHK, k_BSGK, v_BSGV, visibility, scale)
        sees_BTG = _sees(bad_BSG | bad_v_BSG, visibility, q_BTHK.shape[1])
        heads = q_BTHK.shape[2] // k_BSGK.shape[2]
        bad_BTH |= jnp.repeat(sees_BTG, heads, axis=2)
        return jnp.where(bad_BTH[..., None], jnp.nan, o_BTHV)

    return call


def _sees(bad_BSG, visibility, T):
    """Returns (B, T, G), whether a query sees a key that bad_BSG marks, by blocks of queries."""
    B, S, G = bad_BSG.shape
    whole = not chunk_blocks.known(T) or T <= BLOCK_SIZE
    C = T if whole else BLOCK_SIZE

    def ask(any_bad, bad_BSG):
        if not any_bad:
            return jnp.zeros_like(bad_BSG, shape=(B, T, G))
        padded = visibility if whole else visibility.padded(-T % C, 0)

        def block(i):
            seen_BCS = padded.block(i * C, C, 0, S).mask()
            seen_BCS = jnp.broadcast_to(seen_BCS, (B, C, S)).astype(jnp.float32)
            return jnp.einsum("bcs,bsg->bcg", seen_BCS, bad_BSG.astype(jnp.float32)) > 0

        if whole:
            return block(0)
        found_NBCG = jax.lax.map(block, jnp.arange(-(-T // C)))
        return jnp.moveaxis(found_NBCG, 0, 1).reshape(B, -1, G)[:, :T]

    return branches.either(branches.anywhere(bad_BSG), ask, bad_BSG)
