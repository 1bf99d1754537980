"""NaLaFormer: linear attention whose features are sharper the longer the query."""

from seqmodels.mixers import whole_document


class NaLaFormer(whole_document.AffineLinearAttention):
    """Norm-aware linear attention (Meng et al., NaLaFormer, arXiv 2506.21137).

        o_i = q~_i (sum_j k~_j v_j^T) / (n (q_i . mean(k) + eps)) + local(v)_i
        q = relu(u)^p || relu(-u)^p, u = W_q x / |W_q x|, p = 3 (0.5 + tanh |W_q x|)
        k = relu(W_k x)^3 || relu(-W_k x)^3

    v = W_v x; q~ and k~ are q and k with both halves turned by rotary positions along each axis.
    y = W_o (LayerNorm(o) * silu(W_g x)), the norm over all heads. local is a 5 x 5 depthwise
    convolution.
    The features are those of the released code; the paper's text has cosines of the directions.
    NaLaFormer's block has the layer options position_conv=3 and channel_mixer="conv_gelu" too.
    """

    q_map: str = "norm_power"
    k_map: str | None = "signed_cube"
    correction: str = "over_mean"
    rope_base: float | None = 10_000.0
    rope_angles: str = "retnet"
    local: str | None = "depthwise"
    local_size: int = 5
    local_stddev: float | None = 0.02
    gate: str | None = "silu"
    output_norm: str | None = "layer_norm"
    use_bias: bool = True
