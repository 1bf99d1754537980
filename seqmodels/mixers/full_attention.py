"""Softmax attention over whole documents: the baseline of mixers without an order in time."""

import flax.linen as nn

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import grids, norms


class FullAttention(base.WholeDocumentMixer):
    """Softmax attention over a whole document (Vaswani et al., arXiv 1706.03762, eq. 1; ViT).

        o_t = sum_{s in doc(t)} softmax_s(q_t . k_s / sqrt(K)) v_s

    q, k, v = W x; y = W_o o. ViT is arXiv 2010.11929. Its cost grows with the square of a
    document's length, that of linear attention with the length.

    Attributes:
      num_heads, num_kv_heads: H query heads in G key/value groups; G = 1 is multi-query, None is H.
      head_dim: K; None is D / H.
      rope_base: base of rotary angles along the grid's axes (`grids.rope_nd`); None leaves the
        rotation out, and the mixer knows no positions.
      qk_norm: whether each head's q and k are normed by RMSNorm before the rotation.
      use_bias: whether the projections have biases.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float | None = None
    qk_norm: bool = False
    use_bias: bool = False

    @property
    def uses_positions(self) -> bool:
        return self.rope_base is not None

    @nn.compact
    def __call__(
        self, x_BTD, segment_ids_BT=None, state=None, *, layer=None
    ) -> tuple[Array, base.State]:
        self.check_no_state(state)
        B, T, _ = x_BTD.shape
        H, G = self.num_heads, self.num_kv_heads or self.num_heads
        if H % G:
            raise ValueError(f"full_attention: num_kv_heads {G} must divide num_heads {H}")
        K = self.head_dim or self.width_per_head(H)
        q_BTHK = self.project_heads(x_BTD, H, K, "q", use_bias=self.use_bias)
        k_BTGK = self.project_heads(x_BTD, G, K, "k", use_bias=self.use_bias)
        v_BTGK = self.project_heads(x_BTD, G, K, "v", use_bias=self.use_bias)
        if self.qk_norm:
            q_BTHK = norms.NORMS["rms_norm"](name="q_norm")(q_BTHK)
            k_BTGK = norms.NORMS["rms_norm"](name="k_norm")(k_BTGK)
        if self.rope_base is not None:
            coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
            q_BTHK, k_BTGK = (
                grids.rope_nd(x, coordinates_BTA, self.rope_base) for x in (q_BTHK, k_BTGK)
            )
        o_BTHK = operators.softmax_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            causal=False,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        return self.merge_heads(o_BTHK, use_bias=self.use_bias), None
