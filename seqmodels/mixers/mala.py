"""MALA: linear attention whose weights grow apart as the query's norm grows."""

from seqmodels.mixers import whole_document


class MALA(whole_document.AffineLinearAttention):
    """Magnitude-aware linear attention (Fan et al., arXiv 2507.00698).

        o_i = sum_j (beta_i s q~_i . k~_j - gamma_i) v_j / n + local(v)_i
        gamma_i = s q_i . mean(k)
        beta_i = 1 + 1 / gamma_i

    q, k = elu(W x) + 1 and v = W_v x; q~ and k~ are turned by rotary positions along each axis,
    gamma is made before that; s = K^-1/2. y = W_o (o * W_g x). Without the rotation the weights of
    a token sum to 1, and those of a longer query differ more, where division by the sum takes the
    query's norm out. local is a 5 x 5 depthwise convolution ("LePE").
    """

    correction: str = "mala"
    rope_base: float | None = 10_000.0
    rope_angles: str = "retnet"
    local: str | None = "depthwise"
    local_size: int = 5
    local_stddev: float | None = 0.02
    gate: str | None = "identity"
    use_bias: bool = True
