"""mmMamba's mixer: Mamba-2's recurrence on the projections of a softmax layer."""

import math

import flax.linen as nn
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.mixers import attention, gates
from seqmodels.mixers.delta_net import State
from seqmodels.modules import layers, norms, short_conv

SEEDS = ("mimic", "scratch")


class MMMamba(attention.LinearizedAttention):
    """mmMamba (Liao et al., arXiv 2502.13145, eqs. 6-10), on a softmax layer's projections.

        S_t = gamma_t S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t

    y = W_o (RMSNorm(o) * silu(W_g x)), the norm on each head. q, k, v = silu(conv(W x) + bias),
    where W and W_o have the shapes and options of a softmax layer's (`attention.Attention`), but
    for rotation and norms of q and k, which are left out. gamma = exp(-exp(A_log)
    softplus(W_dt x + dt_bias)) per head. W_g starts Xavier uniform with gain 2^-2.5.

    Attributes:
      conv_width: taps.
      seed: "mimic" begins near what softmax attention computes: W_dt = 0, dt ~ LogU(1e-3, 0.1), A =
        e, so that little is forgotten, and convolutions that pass their last input (silu after them
        still changes it). "scratch": dt_bias = 0, A ~ U(1, 16), random convolutions and W_dt.
    """

    rope_base: float | None = None
    conv_width: int = 2
    seed: str = "mimic"

    def _sizes(self):
        self.check_choice("seed", SEEDS)
        return super()._sizes()

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, G, K = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        mimic = self.seed == "mimic"

        def project_conv(name, heads, tail):
            z = self.project(x_BTD, heads * K, name, use_bias=self.use_bias)
            init = short_conv.identity_taps if mimic else None
            conv = self.conv(self.conv_width, use_bias=True, kernel_init=init, name=f"{name}_conv")
            z, tail = conv(z, segment_ids_BT, tail)
            return self._of_all_heads(z.reshape(B, T, heads, K)), tail

        q_BTHK, q_tail = project_conv("q", H, state.q_tail)
        k_BTHK, k_tail = project_conv("k", G, state.k_tail)
        v_BTHV, v_tail = project_conv("v", G, state.v_tail)
        if mimic:
            dt_BTH = self.project(x_BTD, H, "dt", kernel_init=nn.initializers.zeros)
            decay = gates.SoftplusDecay(math.e, math.e, name="decay")
        else:
            dt_BTH = self.project(x_BTD, H, "dt")
            decay = gates.SoftplusDecay(dt_bias_init=nn.initializers.zeros, name="decay")
        log_decay_BTH, _ = decay(dt_BTH)
        o_BTHV, S_BHKV = operators.linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_BTH,
            scale=1.0,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        # Xavier's variance is the mean of fans'; the gain squared is 2^-5.
        init = nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
        gate_BTHV = self.project_heads(x_BTD, H, K, "g", kernel_init=init)
        o_BTHV = layers.gated(norms.RMSNorm(name="o_norm")(o_BTHV), gate_BTHV, nn.silu)
        state = State(S_BHKV, q_tail, k_tail, v_tail)
        o_bias = self.use_bias if self.o_bias is None else self.o_bias
        return self.merge_heads(o_BTHV, use_bias=o_bias), state

    def init_state(self, batch):
        H, G, K = self._sizes()
        tails = (self.conv_tail(batch, self.conv_width, n * K) for n in (H, G, G))
        return State(jnp.zeros((batch, H, K, K), jnp.float32), *tails)
