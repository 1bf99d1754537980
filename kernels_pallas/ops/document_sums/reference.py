"""The definition of `document_sums`: every weight of the sum, as one masked matrix per head."""

import jax.numpy as jnp

from kernels_pallas.common import segments


def visible(segment_ids_BT, length: int, block_size: int | None):
    """Returns which tokens s each token t sums over, booleans (B or 1, T, T) by t and s.

    t sees s iff both are of one document and s's block of `block_size` tokens, counted from the
    document's start, is not later than t's. block_size None is one block per document.
    """
    if segment_ids_BT is None:
        run_BT = jnp.zeros((1, length), jnp.int32)
        position_BT = jnp.arange(length, dtype=jnp.int32)[None]
    else:
        run_BT = segments.run_index(segment_ids_BT)
        position_BT = segments.positions(segment_ids_BT)
    seen_BTS = run_BT[:, :, None] == run_BT[:, None, :]
    if block_size is not None:
        block_BT = position_BT // block_size
        seen_BTS &= block_BT[:, None, :] <= block_BT[:, :, None]
    return seen_BTS


def dense(q_BTHK, k_BTHK, v_BTHV, initial_state_BHKV, segment_ids_BT, scale, block_size=None):
    """Computes `document_sums` from all T x T weights, in the state's dtype; returns (o, final)."""
    dtype = initial_state_BHKV.dtype
    q_BTHK, k_BTHK, v = (x.astype(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
    T = v.shape[1]
    seen_BTS = visible(segment_ids_BT, T, block_size)
    # What each token reads of its document's keys and values.
    weights_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)
    weights_BHTS = jnp.where(seen_BTS[:, None], weights_BHTS, 0)
    o_BTHV = jnp.einsum("BHTS,BSHV->BTHV", weights_BHTS, v)
    # What the row's first document reads of the initial state.
    same_BTS = visible(segment_ids_BT, T, None)
    first_BT11 = same_BTS[:, :, 0, None, None]
    read_BTHV = jnp.einsum("BTHK,BHKV->BTHV", q_BTHK, initial_state_BHKV)
    o_BTHV = o_BTHV + jnp.where(first_BT11, read_BTHV, 0)
    # The sums of the row's last document.
    last_BT11 = same_BTS[:, -1, :, None, None]
    final_BHKV = jnp.einsum("BTHK,BTHV->BHKV", jnp.where(last_BT11, k_BTHK, 0), v)
    entered_B111 = same_BTS[:, -1, 0, None, None, None]
    final_BHKV = final_BHKV + jnp.where(entered_B111, initial_state_BHKV, 0)
    return (scale * o_BTHV).astype(v_BTHV.dtype), final_BHKV
