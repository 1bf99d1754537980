"""LinFusion: normalised linear attention that keeps its scale at any resolution."""

import flax.linen as nn

from seqmodels.mixers import whole_document
from seqmodels.modules import norms


class LinFusion(whole_document.AffineLinearAttention):
    """LinFusion's generalised linear attention (Liu et al., arXiv 2409.02097).

        o_i = q_i (sum_j k_j v_j^T) / (n (q_i . mean(k) + eps))
        q = elu(W_q (x + f_q(x))) + 1
        k = elu(W_k (x + f_k(x))) + 1

    v = W_v x, y = W_o o. f(x) = W_2 leaky_relu(LayerNorm(W_1 x)) is D wide. The weights of a token
    sum to 1, whatever the number of tokens, so that a model trained at one resolution runs at
    another.

    Attributes:
      correction: "over_mean" divides as above; "none" leaves o_i = scale q_i (sum_j k_j v_j^T).
    """

    correction: str = "over_mean"
    eps: float = 1e-4

    def raw(self, x_BTD, name, segment_ids_BT, layer):
        D = x_BTD.shape[-1]
        h_BTD = self.project(x_BTD, D, f"{name}_in", axes=("embed", "mlp"), use_bias=True)
        h_BTD = nn.leaky_relu(norms.LayerNorm(name=f"{name}_norm")(h_BTD))
        h_BTD = self.project(h_BTD, D, f"{name}_out", axes=("mlp", "embed"), use_bias=True)
        return super().raw(x_BTD + h_BTD, name, segment_ids_BT, layer)
