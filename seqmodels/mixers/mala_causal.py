"""MALA for language models: means over the tokens so far."""

from seqmodels.mixers import whole_document


class MALACausal(whole_document.CausalAffineLinearAttention):
    """Magnitude-aware linear attention over the tokens so far (Fan et al., arXiv 2507.00698).

        o_t = sum_{s<=t} (beta_t c q~_t . k~_s - gamma_t) v_s / t
        gamma_t = c q_t . mean_{s<=t} k_s
        beta_t = 1 + 1 / gamma_t

    q, k = elu(W x) + 1 and v = W_v x; q~ and k~ are turned by rotary positions, and gamma is made
    before that; c = K^-1/2. y = W_o (o * W_g x). The means of the paper's vision form run over the
    tokens so far, and there is no local term.
    """

    correction: str = "mala"
    rope_base: float | None = 10_000.0
    gate: str | None = "identity"
    output_bias: bool = False
