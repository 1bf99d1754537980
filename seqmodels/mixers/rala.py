"""RALA: rank-augmented linear attention."""

import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import whole_document


class RALA(whole_document.AffineLinearAttention):
    """Rank-augmented linear attention (Fan et al., arXiv 2411.07635).

        o_i = q~_i (sum_j c_j k~_j v_j^T) / (n (q_i . mean(c k) + eps)) + local(v)_i
        c_j = n softmax_j(s mean(q) . k_j)

    q, k = elu(W x) + 1 and v = W_v x; q~ and k~ are turned by rotary positions along each axis; s =
    K^-1/2. y = W_o (o * W_g x). The weights c raise the rank of sum_j c_j k_j v_j^T, and the gate
    that of y. local is a 5 x 5 depthwise convolution. RAVLT's block has, beside this mixer, the
    layer options position_conv=3 and channel_mixer="conv_gelu".

    Attributes:
      weigh_keys: whether keys have the weights c; else c = 1.
    """

    correction: str = "over_mean"
    rope_base: float | None = 10_000.0
    rope_angles: str = "retnet"
    local: str | None = "depthwise"
    local_size: int = 5
    local_stddev: float | None = 0.02
    gate: str | None = "identity"
    use_bias: bool = True
    weigh_keys: bool = True

    def weighted(self, q_BTHF, k_BTHF, count_BTH1, segment_ids_BT):
        if not self.weigh_keys:
            return k_BTHF
        scale = self._sizes()[1] ** -0.5
        mean_BTHF = operators.document_totals(q_BTHF, segment_ids_BT) / count_BTH1
        logit_BTH1 = scale * jnp.sum(mean_BTHF * k_BTHF, axis=-1, keepdims=True)
        # A softmax over each document's tokens; its maximum changes nothing but the range.
        top_BTH1 = document_max(jax.lax.stop_gradient(logit_BTH1), segment_ids_BT)
        e_BTH1 = jnp.exp(logit_BTH1 - top_BTH1)
        total_BTH1 = operators.document_totals(e_BTH1, segment_ids_BT)
        return k_BTHF * (count_BTH1 * e_BTH1 / total_BTH1)


def document_max(x_BTHV: Array, segment_ids_BT: Array | None = None) -> Array:
    """Returns the maximum of x over each token's document, at each of its tokens, (B, T, H, V)."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.max(x_BTHV, axis=1, keepdims=True), x_BTHV.shape)
    T = x_BTHV.shape[1]

    def row(x_THV, run_T):
        return jax.ops.segment_max(x_THV, run_T, num_segments=T)[run_T]

    return jax.vmap(row)(x_BTHV, operators.run_index(segment_ids_BT))
