"""Gated DeltaNet: the delta rule with a learned decay per head and token."""

from seqmodels.mixers import delta_net


class GatedDeltaNet(delta_net.DeltaRuleMixer):
    """Gated DeltaNet (Yang, Kautz & Hatamizadeh, arXiv 2412.06464, eq. 10).

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t / sqrt(K)

    alpha = exp(-exp(A_log) softplus(W_a x + dt_bias)) per head; y = W_o (RMSNorm(o) * silu(W_g x)).
    At the start exp(A_log) ~ U(0, 16) and softplus(dt_bias) ~ LogU(1e-3, 0.1). Projections and the
    other options are `DeltaRuleMixer`'s; head_dim None is 3/4 D / G, as published.

    Attributes:
      use_gate: whether y has the factor silu(W_g x).
    """

    expand_v: float = 2.0
    use_gate: bool = True

    key_width = 0.75
    use_forget_gate = True
