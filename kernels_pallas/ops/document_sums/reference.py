"""The definition of `document_sums`: every weight of the sum, as one masked matrix per head."""

import jax.numpy as jnp

from kernels_pallas.common import arguments, segments


def runs(v_BTHV, segment_ids_BT, block_ids_BT, block_size):
    """Returns the index of each token's document and block, (B, T) each, from 0 in its row.

    Where a call has neither blocks' ids nor a size, a block is the document.
    """
    B, T = v_BTHV.shape[:2]
    document_BT = block_BT = jnp.zeros_like(v_BTHV, jnp.int32, (B, T))
    if segment_ids_BT is not None:
        document_BT = segments.run_index(segment_ids_BT)
    if block_ids_BT is not None:
        block_BT = segments.run_index(block_ids_BT)
    elif block_size is not None:
        block_BT = segments.block_index(document_BT, block_size)
    return document_BT, block_BT


def seen(document_BT, block_BT):
    """Returns which tokens s each token t sums over, booleans (B, T, T) by t and s.

    t sees s iff both are of one document and the block of s is not later than that of t.
    """
    same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTS & (block_BT[:, None, :] <= block_BT[:, :, None])


def dense(
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
    """Computes `document_sums` from all T x T weights, in the state's dtype; returns (o, final)."""
    del chunk_size
    dtype, H = initial_state_BHKV.dtype, v_BTHV.shape[2]
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, H).astype(dtype) for x in (q_BTGK, k_BTGK))
    v = v_BTHV.astype(dtype)
    # What each token reads of the keys and values that it sees.
    document_BT, block_BT = runs(v_BTHV, segment_ids_BT, block_ids_BT, block_size)
    seen_BTS = seen(document_BT, block_BT)
    weights_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)
    weights_BHTS = jnp.where(seen_BTS[:, None], weights_BHTS, 0)
    o_BTHV = jnp.einsum("BHTS,BSHV->BTHV", weights_BHTS, v)
    # What the row's first document reads of the initial state.
    first_BT11 = (document_BT == 0)[..., None, None]
    read_BTHV = jnp.einsum("BTHK,BHKV->BTHV", q_BTHK, initial_state_BHKV)
    o_BTHV = o_BTHV + jnp.where(first_BT11, read_BTHV, 0)
    # The sums of the row's last document.
    last_BT11 = (document_BT == document_BT[:, -1:])[..., None, None]
    final_BHKV = jnp.einsum("BTHK,BTHV->BHKV", jnp.where(last_BT11, k_BTHK, 0), v)
    entered_B111 = (document_BT[:, -1] == 0)[:, None, None, None]
    final_BHKV = final_BHKV + jnp.where(entered_B111, initial_state_BHKV, 0)
    return (scale * o_BTHV).astype(v_BTHV.dtype), final_BHKV
