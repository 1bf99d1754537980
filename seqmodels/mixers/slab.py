"""SLAB's simplified linear attention."""

from seqmodels.mixers import whole_document
from seqmodels.modules import grids


class SLAB(whole_document.AffineLinearAttention):
    """Simplified linear attention (Guo et al., SLAB, arXiv 2405.11582).

        o_i = q_i (sum_j k_j v_j^T) / (q_i . sum_j k_j + eps) + local(v)_i
        q = relu(W_q x)
        k = relu(W_k x + P)

    v = W_v x, y = W_o o. P is a learned vector for each place of the grid, zero at the start; on
    one axis of any length there is none. local is a 5 x 5 depthwise convolution whose taps all
    heads share. SLAB's norm, PRepBN, is an option of the model.
    """

    q_map: str = "relu"
    local: str | None = "shared"
    local_size: int = 5
    use_bias: bool = True

    @property
    def uses_positions(self) -> bool:
        return super().uses_positions or self.grid is not None

    def raw(self, x_BTD, name, segment_ids_BT, layer):
        raw_BTE = super().raw(x_BTD, name, segment_ids_BT, layer)
        if name == "q" or self.grid is None:
            return raw_BTE
        places = grids.PositionEmbedding(
            "per_token", self.grid, stddev=0.0, param_dtype=self.param_dtype, name="k_positions"
        )
        return places(raw_BTE, segment_ids_BT, layer=layer)
