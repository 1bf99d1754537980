"""LightNet on whole documents: one pass over the tokens of a grid."""

import flax.linen as nn

from seqmodels import operators
from seqmodels.mixers import base, lightnet
from seqmodels.modules import documents, grids


class LightNetND(base.WholeDocumentMixer):
    """LightNet in any number of dimensions, one scan (Qin et al., arXiv 2405.21022).

        o_t = (sum_s khat_s v_s^T)^T q_t
        khat_s = exp(k_s) / sum_{s'} exp(k_s')

    over all tokens s and s' of t's document. q = silu(W_q x), k = W_k x, v = W_v x, q and khat
    rotated by the tokens' places on the grid (MD-LRPE); y = W_o (RMSNorm(o) * silu(W_up W_down x)),
    the norm over all heads together. The softmax takes each key channel for itself.

    Attributes:
      num_heads: H; K = V = D / H.
      rope_base: base of the rotary angles; None leaves the rotation out.
      gate_rank: width of W_down x.
      norm_eps: epsilon of the RMSNorm.
    """

    num_heads: int = 4
    rope_base: float | None = 10_000.0
    gate_rank: int = 128
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        B, T, _ = x_BTD.shape
        grids.check_grid("lightnet_nd", self.grid, T, segment_ids_BT)
        q_BTHK, k_BTHK, v_BTHV = lightnet.projections(self, x_BTD)
        weight_BTHK = documents.softmax(k_BTHK, segment_ids_BT).astype(self.dtype)
        if self.rope_base is not None:
            place_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
            q_BTHK, weight_BTHK = (
                grids.rope_nd(x, place_BTA, self.rope_base, "lrpe") for x in (q_BTHK, weight_BTHK)
            )
        o_BTHV, _ = operators.document_sums(
            q_BTHK,
            weight_BTHK,
            v_BTHV,
            scale=1.0,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        return lightnet.gated_output(self, o_BTHV, x_BTD), None
