"""Softmax attention, full or windowed, for baselines and hybrids: the public function."""

import jax
import jax.numpy as jnp


def softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    *,
    window: int | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the s that t may see.

    For decoding, keys lie in a cache: kv_positions_BS (-1 an empty slot), kv_segment_ids_BS, q_positions_BT.
    """
    del implementation
    B, T = q_BTHK.shape[:2]
    S = k_BTGK.shape[1]
    if kv_positions_BS is None:
        q_positions_BT = kv_positions_BS = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    age_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    visible_BTS = jnp.broadcast_to((kv_positions_BS >= 0)[:, None], (B, T, S))
    if causal:
        visible_BTS = visible_BTS & (age_BTS >= 0)
    if window is not None:
        visible_BTS = visible_BTS & (jnp.abs(age_BTS) < window)
    if segment_ids is not None:
        kv_segment_ids_BS = segment_ids if kv_segment_ids_BS is None else kv_segment_ids_BS
        visible_BTS = visible_BTS & (segment_ids[:, :, None] == kv_segment_ids_BS[:, None, :])
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGV, mask=visible_BTS[:, None], scale=scale
    )
