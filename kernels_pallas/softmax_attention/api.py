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
    implementation: str | None = None,
) -> jax.Array:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the s that t may see."""
    del implementation
    T = q_BTHK.shape[1]
    age_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    visible_TS = jnp.full((T, T), True) if not causal else age_TS >= 0
    if window is not None:
        visible_TS = visible_TS & (jnp.abs(age_TS) < window)
    mask = visible_TS[None, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGV, mask=mask, scale=scale)
