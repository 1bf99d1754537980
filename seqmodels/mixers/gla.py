"""Gated linear attention: a learned decay per key channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.mixers import base
from seqmodels.modules import layers, norms
from seqmodels.operators import linear_attention


class GLA(base.ChunkedMixer):
    """Gated linear attention (Yang et al., arXiv 2312.06635, section 4.1 and eq. 3).

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t / sqrt(K)

    q, k, v = W x, with no feature map and no convolution; log alpha = logsigmoid(W_up W_down x + b)
    / gate_temperature, per key channel; y = W_o (RMSNorm(o) * silu(W_g x)), the norm on each head.
    b starts at 0. The mixer's state is S_BHKV.

    Attributes:
      num_heads: H.
      expand_k, expand_v: K = expand_k D / H and V = expand_v D / H.
      gate_rank: width of W_down x.
      gate_temperature: divisor of log alpha; a larger one forgets more slowly.
      norm_eps: epsilon of the RMSNorm.
    """

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_temperature: float = 16.0
    norm_eps: float = 1e-5

    def _sizes(self) -> tuple[int, int, int]:
        H = self.num_heads
        return H, self.width_per_head(H, self.expand_k), self.width_per_head(H, self.expand_v)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K, V = self._sizes()
        # The decay's logits, by way of a low rank.
        low_rank = self.project(x_BTD, self.gate_rank, "gk_down", axes=("embed", None))
        gate_BTHK = self.project_heads(low_rank, H, K, "gk_up", axes=(None, "heads"), use_bias=True)
        o_BTHV, S_BHKV = linear_attention(
            self.project_heads(x_BTD, H, K, "q"),
            self.project_heads(x_BTD, H, K, "k"),
            self.project_heads(x_BTD, H, V, "v"),
            jax.nn.log_sigmoid(gate_BTHK.astype(jnp.float32)) / self.gate_temperature,
            **self.recurrence_keywords(state, segment_ids_BT),
        )
        gate_BTHV = self.project_heads(x_BTD, H, V, "g")
        o_BTHV = norms.RMSNorm(self.norm_eps, name="o_norm")(o_BTHV)
        o_BTHV = layers.gated(o_BTHV, gate_BTHV, nn.silu)
        return self.merge_heads(o_BTHV), S_BHKV

    def init_state(self, batch):
        H, K, V = self._sizes()
        return jnp.zeros((batch, H, K, V), jnp.float32)
