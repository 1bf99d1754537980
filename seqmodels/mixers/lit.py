"""LiT: linear diffusion transformers with few heads."""

from seqmodels.mixers import whole_document


class LiT(whole_document.AffineLinearAttention):
    """LiT's linear attention (Wang et al., arXiv 2501.12976).

        o_i = q_i (sum_j k_j v_j^T) / (q_i . sum_j k_j + eps) + local(v)_i

    q, k = relu(W x) and v = W_v x; y = W_o o. Few heads cost no more than many, and give each a
    larger state. local is a 5 x 5 depthwise convolution.

    Attributes:
      num_heads: H; the paper takes 2, 3 and 4 at DiT's sizes S, B and XL.
    """

    num_heads: int = 2
    q_map: str = "relu"
    local: str | None = "depthwise"
    local_size: int = 5
    use_bias: bool = True
