"""HGRN2: gated linear attention whose key is one minus its forget gate."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import norms
from seqmodels.operators import linear_attention


class HGRN2(base.ChunkedMixer):
    """HGRN2 (Qin et al., arXiv 2404.07904, eq. 7 and section 3.3).

        S_t = diag(g_t) S_{t-1} + (1 - g_t) v_t^T
        o_t = S_t^T q_t
        g_t = lb + (1 - lb) sigmoid(W_f x_t)

    q = silu(W_q x), v = W_i x; y = W_o RMSNorm(o), the norm over all heads together, without an
    output gate. lb is the layer's learned lower bound, `base.Layer.lower_bound_D`, and 0 for a
    mixer that is not in a stack. The mixer's state is S_BHKV.

    Attributes:
      expand_ratio: K and V of each head; there are H = D / expand_ratio heads.
      norm_eps: epsilon of the RMSNorm.
    """

    expand_ratio: int = 128
    norm_eps: float = 1e-5

    uses_lower_bound = True

    def _sizes(self) -> tuple[int, int]:
        K = self.expand_ratio
        if self.d_model % K:
            raise ValueError(f"hgrn2: expand_ratio {K} must divide d_model {self.d_model}")
        return self.d_model // K, K

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K = self._sizes()
        lower_bound_D = None if layer is None else layer.lower_bound_D
        if lower_bound_D is None:
            lower_bound_D = jnp.zeros((self.d_model,), jnp.float32)
        f_BTHK = self.project_heads(x_BTD, H, K, "f").astype(jnp.float32)
        log_g_BTHK, k_BTHK = bounded_forget_gate(f_BTHK, lower_bound_D.reshape(1, 1, H, K))
        o_BTHV, S_BHKV = linear_attention(
            nn.silu(self.project_heads(x_BTD, H, K, "q")),
            k_BTHK.astype(self.dtype),
            self.project_heads(x_BTD, H, K, "i"),
            log_g_BTHK,
            scale=1.0,
            **self.recurrence_keywords(state, segment_ids_BT),
        )
        o_BTD = o_BTHV.reshape(x_BTD.shape)
        return self.merge_heads(norms.RMSNorm(self.norm_eps, name="o_norm")(o_BTD)), S_BHKV

    def init_state(self, batch):
        H, K = self._sizes()
        return jnp.zeros((batch, H, K, K), jnp.float32)


def bounded_forget_gate(f: Array, lower_bound: Array) -> tuple[Array, Array]:
    """Returns log g and 1 - g of the forget gate g = lb + (1 - lb) sigmoid(f).

    Both and their gradients are finite for any f and 0 <= lb < 1, lb being `lower_bound`. log g is
    log1p(-(1 - g)) where 1 - g < 1/2, else logaddexp(f, log lb) - softplus(f).
    """
    k = (1.0 - lower_bound) * jax.nn.sigmoid(-f)
    small = k < 0.5
    # Where lb is 0 its logarithm is a constant -inf: log(lb) would have an infinite gradient.
    positive = lower_bound > 0
    log_bound = jnp.where(positive, jnp.log(jnp.where(positive, lower_bound, 1.0)), -jnp.inf)
    log_bound = jnp.broadcast_to(log_bound, f.shape)
    log_g_of_small_g = jnp.logaddexp(f, log_bound) - jax.nn.softplus(f)
    return jnp.where(small, jnp.log1p(-jnp.where(small, k, 0.0)), log_g_of_small_g), k
