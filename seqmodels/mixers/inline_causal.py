"""InLine attention for language models: means over the tokens so far."""

from seqmodels.mixers import whole_document


class InLineCausal(whole_document.CausalAffineLinearAttention):
    """InLine attention over the tokens so far, our causal form of Han et al. (arXiv 2412.06590).

        o_t = sum_{s<=t} w_ts v_s
        w_ts = (c q_t . k_s - mean_{s<=t} (c q_t . k_s) + 1) / t

    q, k, v = W x, of both signs, turned by rotary positions in q_t . k_s but not in its mean, and
    c = K^-1/2; y = W_o o. Without the rotation the weights of a token sum to 1. There is no local
    term, which a layer of another mixer, or its own convolution, gives a language model.
    """

    q_map: str = "identity"
    correction: str = "inline"
    rope_base: float | None = 10_000.0
    output_bias: bool = False
