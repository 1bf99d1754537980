"""InLine attention: an injective linear attention with a predicted local term."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import whole_document
from seqmodels.modules import grids, layers, short_conv


class InLine(whole_document.AffineLinearAttention):
    """InLine attention (Han et al., Bridging the Divide, arXiv 2412.06590).

        o_i = sum_j w_ij v_j + local(v)_i
        w_ij = (s q_i . k_j - mean_j (s q_i . k_j) + 1) / n

    q, k, v = W x, of both signs, and s = K^-1/2; y = W_o o. The n weights of a token sum to 1, and
    two queries have the same weights only if they are equal where keys differ: the map is
    injective, while division by the sum gives queries that are multiples of each other the same
    weights. local is a depthwise convolution whose taps are W_2 gelu(W_1 mean(x) + b_1) + b_2 per
    head, of the document's mean (the code of the paper, whose eq. 5 leaves s out).

    Attributes:
      local: "predicted"; or as in `AffineLinearAttention`.
    """

    q_map: str = "identity"
    correction: str = "inline"
    local: str | None = "predicted"
    use_bias: bool = True

    local_terms = (*whole_document.LOCAL_TERMS, "predicted")

    def local_term(self, v_BTHV, x_BTD, count_BTH1, segment_ids_BT, layer):
        if self.local != "predicted":
            return super().local_term(v_BTHV, x_BTD, count_BTH1, segment_ids_BT, layer)
        B, T, H, V = v_BTHV.shape
        taps = grids.kernel_sizes(self.local_size, self.grid)
        # The mean of x over each token's document, cut into heads.
        x_BTHD = x_BTD.reshape(B, T, H, self.width_per_head(H))
        mean_BTHD = operators.document_totals(x_BTHD, segment_ids_BT) / count_BTH1
        if segment_ids_BT is None:  # all tokens of a row have one mean
            mean_BTHD = mean_BTHD[:, :1]
        hidden = _PerHead(mean_BTHD.shape[-1], name="local_hidden")(mean_BTHD)
        I = math.prod(taps)
        w = _PerHead(V * I, name="local")(jax.nn.gelu(hidden, approximate=False))
        w = w.reshape(*w.shape[:2], H * V, I).swapaxes(-1, -2).astype(self.dtype)
        if segment_ids_BT is None:
            w = w[:, 0]
        v_BTE = v_BTHV.reshape(B, T, H * V)
        return grids.depthwise(v_BTE, w, segment_ids_BT, self.grid, taps)


class _PerHead(nn.Module):
    """A dense layer with a matrix and a bias for each head: x_BTHD to y_BTHF, float32.

    Both start as PyTorch's grouped convolutions do, U(-1/sqrt(D), 1/sqrt(D)).
    """

    features: int

    @nn.compact
    def __call__(self, x_BTHD: Array) -> Array:
        H, D = x_BTHD.shape[2:]
        init = short_conv.uniform_fan_in(D)
        kernel_init = layers.partitioned(init, ("heads", None, None))
        W_HDF = self.param("kernel", kernel_init, (H, D, self.features), jnp.float32)
        bias_init = layers.undecayed(init, ("heads", None))
        b_HF = self.param("bias", bias_init, (H, self.features), jnp.float32)
        return jnp.einsum("BTHD,HDF->BTHF", x_BTHD, W_HDF) + b_HF[None, None]
