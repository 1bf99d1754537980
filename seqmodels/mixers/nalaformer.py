"""NaLaFormer: linear attention whose features are sharper the longer the query."""

from seqmodels.mixers import whole_document


class NaLaFormer(whole_document.AffineLinearAttention):
    """Norm-aware linear attention (Meng et al., NaLaFormer, arXiv 2506.21137).

        o_i = phi(q_i)~ (sum_j psi(k_j)~ v_j^T) / (n (phi(q_i) . mean(psi(k)) + eps)) + local(v)_i
        phi(q) = relu(u)^p || relu(-u)^p, u = q / |q|, p = 3 (1/2 + tanh |q|)
        psi(k) = relu(k)^3 || relu(-k)^3

    q, k, v = W x; ~ turns both halves of the features by rotary positions along each axis. y = W_o
    (LayerNorm(o) * silu(W_g x)), the norm over all heads. local is a 5 x 5 depthwise convolution.
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
