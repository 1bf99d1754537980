"""Compares the weights of linear attention to softmax's, without all weights in memory."""

import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array


def cross_entropy(
    q_BTHK: Array,
    k_BTGK: Array,
    phi_q_BTHF: Array,
    phi_k_BTHF: Array,
    segment_ids_BT: Array | None = None,
    *,
    window: int | None = None,
    factor_H: Array | None = None,
    eps: float = 1e-12,
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """Returns the cross-entropy of linear attention's weights Q on softmax's P, and P's entropy.

        -sum_n P_mn log Q_mn        -sum_n P_mn log P_mn
        P_mn = softmax_n(q_m . k_n / sqrt(K))
        Q_mn = phi(q_m) . phi(k_n) / sum_n' phi(q_m) . phi(k_n')

    over n <= m of the same document (Hedgehog, arXiv 2402.04347, eq. 5), each (B, T, H), float32.
    Their difference is the KL divergence. P is the target and has no gradient. With a window, Q is
    LoLCATs' (arXiv 2410.10254, eq. 7): the `window` latest n have the weights factor exp(q_m . k_n
    / sqrt(K) - c_m), c_m the largest exponent, in place of phi(q_m) . phi(k_n), under one
    denominator.

    Queries are processed `chunk_size` at a time, in both passes, so that at most
    B x H x chunk_size x T weights are in memory.

    Args:
      q_BTHK, k_BTGK: queries and keys, rotated as softmax attention takes them.
      window, factor_H: size and factor of LoLCATs' softmax window; both or neither.
      eps: the smallest weight, and what is added to the sum of weights.
    """
    B, T, H, K = q_BTHK.shape
    N = -(-T // chunk_size)
    run_BT = jnp.zeros((B, T), jnp.int32)
    if segment_ids_BT is not None:
        run_BT = operators.run_index(segment_ids_BT)
    k_BTHK = jnp.repeat(k_BTGK, H // k_BTGK.shape[2], axis=2).astype(jnp.float32)
    phi_k_BTHF = phi_k_BTHF.astype(jnp.float32)

    # The last query fills up the last piece: its rows are as sound as any, and are cut off again.
    index_NC = jnp.minimum(jnp.arange(N * chunk_size), T - 1).reshape(N, chunk_size)

    def pieces(x):
        return jnp.moveaxis(x[:, index_NC], 1, 0)

    @jax.checkpoint
    def piece(_, inputs):
        index_C, run_BC, q_BCHK, phi_q_BCHF = inputs
        # Weights P of softmax.
        behind_CT = index_C[:, None] - jnp.arange(T)[None]
        seen_BCT = (behind_CT >= 0)[None] & (run_BC[:, :, None] == run_BT[:, None])
        seen_B1CT = seen_BCT[:, None]
        logits_BHCT = jnp.einsum("bchk,bthk->bhct", q_BCHK.astype(jnp.float32), k_BTHK) * K**-0.5
        logits_BHCT = jnp.where(seen_B1CT, logits_BHCT, -jnp.inf)
        log_P_BHCT = jax.lax.stop_gradient(jax.nn.log_softmax(logits_BHCT))
        P_BHCT = jnp.exp(log_P_BHCT)
        # Weights Q before their sum divides them: linear, and softmax within the window.
        weight_BHCT = jnp.einsum("bchf,bthf->bhct", phi_q_BCHF.astype(jnp.float32), phi_k_BTHF)
        weight_BHCT = jnp.where(seen_B1CT, weight_BHCT, 0.0)
        if window is not None and factor_H is not None:
            near_11CT = (behind_CT < window)[None, None]
            near_BHCT = jnp.where(near_11CT, logits_BHCT, -jnp.inf)
            highest_BHC1 = jnp.max(near_BHCT, axis=-1, keepdims=True)
            near_BHCT = factor_H[None, :, None, None] * jnp.exp(near_BHCT - highest_BHC1)
            weight_BHCT = jnp.where(near_11CT, near_BHCT, weight_BHCT)
        # -sum P log Q and -sum P log P.
        total_BHC = jnp.log(jnp.sum(weight_BHCT, axis=-1) + eps)
        log_Q_BHCT = jnp.log(jnp.maximum(weight_BHCT, eps)) - total_BHC[..., None]
        cross_BHC = -jnp.sum(P_BHCT * jnp.where(seen_B1CT, log_Q_BHCT, 0.0), axis=-1)
        own_BHC = -jnp.sum(P_BHCT * jnp.where(seen_B1CT, log_P_BHCT, 0.0), axis=-1)
        return None, (cross_BHC, own_BHC)

    _, found = jax.lax.scan(piece, None, (index_NC, *map(pieces, (run_BT, q_BTHK, phi_q_BTHF))))

    def whole(x_NBHC):
        return jnp.moveaxis(x_NBHC, (1, 2), (0, 3)).reshape(B, -1, H)[:, :T]

    return whole(found[0]), whole(found[1])
