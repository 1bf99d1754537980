"""RetNet: retention, linear attention with one fixed decay per head."""

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import layers, norms, positions
from seqmodels.operators import linear_attention


class RetNet(base.ChunkedMixer):
    """RetNet (Sun et al., arXiv 2307.08621, eqs. 6 and 8).

        S_t = gamma_h S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t / sqrt(K)
        gamma_h = 1 - 2^(-5-h)

    q, k = rope(W x), v = W_v x; y = W_o (RMSNorm(o) * silu(W_g x)), the norm on each head. The
    decay of head h = 0 .. H-1 is a constant. Rotary positions have no xPos scaling, and RMSNorm
    replaces GroupNorm, as in flash-linear-attention.

    Attributes:
      num_heads: H.
      expand_k, expand_v: K = expand_k D / H and V = expand_v D / H.
      rope_base: base of the rotary angles.
      norm_eps: epsilon of the RMSNorm.
    """

    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def _sizes(self) -> tuple[int, int, int]:
        H = self.num_heads
        return H, self.width_per_head(H, self.expand_k), self.width_per_head(H, self.expand_v)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K, V = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        o_BTHV, S_BHKV = linear_attention(
            positions.rope(self.project_heads(x_BTD, H, K, "q"), position_BT, self.rope_base),
            positions.rope(self.project_heads(x_BTD, H, K, "k"), position_BT, self.rope_base),
            self.project_heads(x_BTD, H, V, "v"),
            log_decay(H),
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        gate_BTHV = self.project_heads(x_BTD, H, V, "g")
        o_BTHV = norms.RMSNorm(self.norm_eps, name="o_norm")(o_BTHV)
        o_BTHV = layers.gated(o_BTHV, gate_BTHV, nn.silu)
        return self.merge_heads(o_BTHV), base.PositionedState(S_BHKV, position_BT[:, -1] + 1)

    def init_state(self, batch):
        H, K, V = self._sizes()
        return base.PositionedState.empty(batch, H, K, V)


def log_decay(heads: int) -> Array:
    """Returns the log decay log(1 - 2^(-5-h)) of each head h = 0 .. heads-1: (H,), float32."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=jnp.float32))))
