"""Softmax attention by its definition, in float32 or wider: every query against every key."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import dtypes


def naive(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Computes o_t = sum_s p_ts v_s, p_t the softmax of scale q_t^T k_s over the keys that t sees.

    Arguments are normalised by `api.py`; `visibility` is the mask. A query without keys gets 0.
    """
    B, T, H, K = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    dtype = dtypes.common(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K).astype(dtype)
    k_BSGK, v_BSGV = k_BSGK.astype(dtype), v_BSGV.astype(dtype)
    seen_BGRTS = visibility.mask()[:, None, None]
    logits_BGRTS = scale * jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, precision="highest")
    logits_BGRTS = jnp.where(seen_BGRTS, logits_BGRTS, -jnp.inf)
    top_BGRT1 = jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1, keepdims=True))
    top_BGRT1 = jnp.where(jnp.isfinite(top_BGRT1), top_BGRT1, 0)  # a row that sees nothing
    weight_BGRTS = jnp.exp(logits_BGRTS - top_BGRT1)
    total_BGRT1 = jnp.sum(weight_BGRTS, axis=-1, keepdims=True)
    weight_BGRTS = weight_BGRTS / jnp.where(total_BGRT1 > 0, total_BGRT1, 1)
    o_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", weight_BGRTS, v_BSGV, precision="highest")
    return o_BTGRV.reshape(B, T, H, V).astype(q_BTHK.dtype)
