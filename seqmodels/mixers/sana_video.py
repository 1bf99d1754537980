"""SANA-Video's linear attention: whole videos, or block by block with a state of constant size."""

from seqmodels.mixers import whole_document
from seqmodels.modules import norms


class SANAVideo(whole_document.AffineLinearAttention):
    """SANA-Video's linear attention (Chen et al., arXiv 2509.24695).

        o_i = q~_i (sum_j k~_j v_j^T) / (q_i . sum_j k_j + eps)

    q, k = relu(RMSNorm(W x)), the norm over all heads, and v = W_v x; y = W_o o. q~ and k~ are
    turned by rotary positions along each axis; the denominator is not, so that it stays positive.
    The sums run over the whole document, or with `block_size` over the tokens of a token's own
    block and of earlier ones. Then a call takes and returns a `whole_document.State`, whose size
    does not depend on the blocks so far, and pieces of whole blocks give what one call on all of
    them gives. SANA-Video's block has the layer option channel_mixer="conv_swiglu" too.

    Attributes:
      block_size: tokens per block, such as those of a few frames; None is the whole document.
    """

    q_map: str = "relu"
    eps: float = 1e-15
    rope_base: float | None = 10_000.0
    block_size: int | None = None

    def init_state(self, batch):
        return super().init_state(batch) if self.block_size is None else self.no_sums(batch)

    def raw(self, x_BTD, name, segment_ids_BT, layer):
        raw_BTE = super().raw(x_BTD, name, segment_ids_BT, layer)
        return norms.RMSNorm(1e-5, name=f"{name}_norm")(raw_BTE)
