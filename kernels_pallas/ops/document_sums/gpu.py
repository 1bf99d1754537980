"""Sums over packed documents by linear attention's Triton kernels, in two sweeps over the tokens.

The first sweep is linear attention over documents, from the left: each token reads itself and the
tokens before it. The second is linear attention over blocks, from the right, with keys and values
shifted by one token: each token reads those behind it. So kernels that are verified, with their own
backward pass, serve as they are, and nothing is subtracted. The price is that q, k, v and one
output are reversed in memory.
"""

from typing import Any

import jax.numpy as jnp

from kernels_pallas.ops.document_sums import reference
from kernels_pallas.ops.linear_attention import gpu as linear_attention


def run(
    *,
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
    """Computes sums over documents from normalised arguments; returns (o_BTHV, final_BHKV)."""
    how = {"log_decay_BTHK": None, "chunk_size": chunk_size, "scale": scale}
    # From the left: o_t = scale (initial state + sum_{s <= t} k_s v_s^T)^T q_t
    earlier_BTHV, final_BHKV = linear_attention.run(
        q_BTGK=q_BTGK,
        k_BTGK=k_BTGK,
        v_BTHV=v_BTHV,
        initial_state_BHKV=initial_state_BHKV,
        segment_ids_BT=segment_ids_BT,
        **how,
    )

    def flipped(x_BTX: Any) -> Any:
        return None if x_BTX is None else jnp.flip(x_BTX, axis=1)

    def behind(x_BTHX):
        """Shifts by one token, so that each token has the one behind it, or zeros at the end."""
        return jnp.pad(x_BTHX[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))

    # From the right: o_t = scale (sum_{s > t} k_s v_s^T)^T q_t, over the runs of blocks
    if block_size is not None:
        _, block_ids_BT = reference.runs(v_BTHV, None, None, block_size)
    next_k_BTGK = behind(k_BTGK)
    if block_ids_BT is not None:
        same_BT = block_ids_BT[:, 1:] == block_ids_BT[:, :-1]
        same_BT = jnp.pad(same_BT, ((0, 0), (0, 1)))
        next_k_BTGK = jnp.where(same_BT[..., None, None], next_k_BTGK, 0)
    later_BTHV, _ = linear_attention.run(
        q_BTGK=flipped(q_BTGK),
        k_BTGK=flipped(next_k_BTGK),
        v_BTHV=flipped(behind(v_BTHV)),
        initial_state_BHKV=jnp.zeros_like(initial_state_BHKV),
        segment_ids_BT=flipped(block_ids_BT),
        **how,
    )
    wide = initial_state_BHKV.dtype
    o_BTHV = earlier_BTHV.astype(wide) + flipped(later_BTHV).astype(wide)
    return o_BTHV.astype(v_BTHV.dtype), final_BHKV


def unsupported_reason(*, segment_ids_BT, block_ids_BT, block_size, **call) -> str | None:
    """Returns why linear attention's kernels cannot run one of the two sweeps, or None."""
    del block_size
    for ids_BT in (segment_ids_BT, block_ids_BT):
        call["segment_ids_BT"] = ids_BT
        reason = linear_attention.unsupported_reason(log_decay_BTHK=None, **call)
        if reason is not None:
            return reason
    return None


def passed_over_reason(*, block_ids_BT, **call) -> str | None:
    """Returns why XLA serves a call better, or None."""
    del call
    if block_ids_BT is None:
        return "rows that are one document need two matrix products and no sweep ('chunked')"
    return None
