"""DeltaProduct: several delta-rule steps per token, hence products of Householder matrices."""

from seqmodels.mixers import delta_net


class DeltaProduct(delta_net.DeltaRuleMixer):
    """DeltaProduct (Siems et al., arXiv 2502.10297, section 3).

        S_t = prod_{j=n..1} (I - beta_t,j k_t,j k_t,j^T) S_{t-1} + B_t
        B_t = sum_j (prod_{i=n..j+1} (I - beta_t,i k_t,i k_t,i^T)) beta_t,j k_t,j v_t,j^T
        o_t = S_t^T q_t / sqrt(K)

    Each token has n of k, v and beta, each with its own projection, and one q. Projections and the
    other options are `DeltaRuleMixer`'s; beta is in [0, 2] unless allow_neg_eigval is False.

    Attributes:
      num_householder: n delta-rule steps per token.
      use_forget_gate: whether S_{t-1} first decays by alpha_t, as in Gated DeltaNet.
      use_gate: whether y = W_o (RMSNorm(o) * silu(W_g x)); else y = W_o RMSNorm(o).
    """

    allow_neg_eigval: bool = True
    num_householder: int = 2
    use_forget_gate: bool = False
    use_gate: bool = False
