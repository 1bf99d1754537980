"""Gated DeltaNet: the delta rule with a learned scalar decay."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas import delta_rule
from seqmodels import norms, short_conv
from seqmodels.array_typing import Array
from seqmodels.mixers import base, gates


@flax.struct.dataclass
class State:
    """S_BHKV and the last inputs of the convolutions on q, k and v."""

    S_BHKV: Array
    q_tail: Array
    k_tail: Array
    v_tail: Array


class GatedDeltaNet(base.Mixer):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  o_t = S_t^T q_t / sqrt(K)
    (Yang, Kautz & Hatamizadeh, arXiv 2412.06464, eq. 10).

    q, k, v = silu(conv(W x)), q and k of unit length; beta = sigmoid(W_b x); alpha = exp(-exp(A_log)
    softplus(W_a x + dt_bias)) a head; y = W_o (RMSNorm(o) * silu(W_g x)).
    A ~ U(0, 16); dt_bias is the inverse softplus of dt ~ LogU(1e-3, 0.1).

    num_heads: G heads of q and k. num_v_heads: H heads of v, beta and alpha; None is G.
    head_dim: K; None is 3/4 D / G, as published. expand_v: V / K.
    allow_neg_eigval: beta in [0, 2], so that I - beta k k^T may reflect (arXiv 2411.12537).
    """

    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_width: int = 4
    allow_neg_eigval: bool = False

    def _sizes(self) -> tuple[int, int, int, int]:
        G, H = self.num_heads, self.num_v_heads or self.num_heads
        if H % G:
            raise ValueError(f"gated_delta_net: num_heads {G} must divide num_v_heads {H}")
        K = self.head_dim or 3 * self.d_model // (4 * G)
        return G, H, K, int(K * self.expand_v)

    def _conv(self, name: str | None = None) -> short_conv.ShortConv:
        parent = {} if name else {"parent": None}
        return short_conv.ShortConv(
            self.conv_width, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **parent
        )

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        G, H, K, V = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q, q_tail = self._conv("q_conv")(
            self.project(x_BTD, G * K, "q"), segment_ids_BT, state.q_tail
        )
        k, k_tail = self._conv("k_conv")(
            self.project(x_BTD, G * K, "k"), segment_ids_BT, state.k_tail
        )
        v, v_tail = self._conv("v_conv")(
            self.project(x_BTD, H * V, "v"), segment_ids_BT, state.v_tail
        )
        beta_BTH = jax.nn.sigmoid(self.project(x_BTD, H, "b").astype(jnp.float32))
        log_decay_BTH = gates.SoftplusDecay(name="decay", A_min=0.0)(self.project(x_BTD, H, "a"))
        o_BTHV, S_BHKV = delta_rule(
            norms.l2_norm(q.reshape(B, T, G, K)),
            norms.l2_norm(k.reshape(B, T, G, K)),
            v.reshape(B, T, H, V),
            beta_BTH * (2.0 if self.allow_neg_eigval else 1.0),
            log_decay_BTH,
            initial_state=state.S_BHKV,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        gate_BTHV = nn.silu(self.project_heads(x_BTD, H, V, "g"))
        o_BTHV = norms.RMSNorm(name="o_norm")(o_BTHV) * gate_BTHV
        return self.merge_heads(o_BTHV), State(S_BHKV, q_tail, k_tail, v_tail)

    def init_state(self, batch):
        G, H, K, V = self._sizes()
        conv = self._conv()
        q_tail, k_tail, v_tail = (conv.init_state(batch, n) for n in (G * K, G * K, H * V))
        return State(jnp.zeros((batch, H, K, V), jnp.float32), q_tail, k_tail, v_tail)
