"""Mamba-2 (SSD): a state space model with one decay per head, hence linear attention."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base, gates
from seqmodels.modules import layers, norms
from seqmodels.operators import linear_attention


@flax.struct.dataclass
class State:
    """Fields of Mamba-2's state.

    Attributes:
      S_BHKV: the recurrence's matrix state.
      x_tail, B_tail, C_tail: the last inputs of the convolutions on x, B and C.
    """

    S_BHKV: Array
    x_tail: Array
    B_tail: Array
    C_tail: Array


class Mamba2(base.ChunkedMixer):
    """Mamba-2 (Dao & Gu, arXiv 2405.21060, eq. 16 and section 7).

        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T
        o_t = S_t^T C_t + D x_t

    x, B, C = silu(conv(W u) + bias) of the layer's input u; dt = softplus(W_dt u + dt_bias), A =
    -exp(A_log) and the skip weight D are one number per head. y = W_o RMSNorm(o * silu(W_z u)): the
    mean square is over the heads of each group, and the gain is (E,). At the start -A ~ U(1, 16),
    softplus(dt_bias) ~ LogU(1e-3, 0.1) and D = 1.

    Attributes:
      expand: E = expand * d_model is the width of x and z.
      head_dim: V; there are H = E / V heads.
      d_state: K, the width of B and C.
      num_groups: G; the H / G heads of a group share B and C.
      conv_width: number of taps.
      use_bias, conv_bias: whether the projections, and the convolutions, have biases.
      norm_eps: epsilon of the RMSNorm.
    """

    expand: int = 2
    head_dim: int = 64
    d_state: int = 128
    num_groups: int = 1
    conv_width: int = 4
    use_bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5

    def _sizes(self) -> tuple[int, int, int, int]:
        E, G, K, V = self.expand * self.d_model, self.num_groups, self.d_state, self.head_dim
        if E % V:
            raise ValueError(f"mamba2: head_dim {V} must divide expand * d_model = {E}")
        if (E // V) % G:
            raise ValueError(f"mamba2: num_groups {G} must divide the {E // V} heads")
        return G, E // V, K, V

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        G, H, K, V = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)

        def project_conv(heads, dim, name, tail):
            z = self.project(x_BTD, heads * dim, name, use_bias=self.use_bias)
            conv = self.conv(self.conv_width, use_bias=self.conv_bias, name=f"{name}_conv")
            z, tail = conv(z, segment_ids_BT, tail)
            return z.reshape(B, T, heads, dim), tail

        x_BTHV, x_tail = project_conv(H, V, "x", state.x_tail)
        B_BTGK, B_tail = project_conv(G, K, "B", state.B_tail)
        C_BTGK, C_tail = project_conv(G, K, "C", state.C_tail)
        dt_BTH = self.project(x_BTD, H, "dt", use_bias=self.use_bias)
        log_decay_BTH, dt_BTH = gates.SoftplusDecay(name="decay")(dt_BTH)
        o_BTHV, S_BHKV = linear_attention(
            C_BTGK,
            B_BTGK,
            (x_BTHV * dt_BTH[..., None]).astype(self.dtype),
            log_decay_BTH,
            scale=1.0,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        D_H = layers.gate_parameter(self, "D", nn.initializers.ones, (H,))
        o_BTHV = o_BTHV + (x_BTHV * D_H[None, None, :, None]).astype(self.dtype)
        z_BTHV = self.project_heads(x_BTD, H, V, "z", use_bias=self.use_bias)
        o_BTHV = layers.gated(o_BTHV, z_BTHV, nn.silu)
        norm = norms.RMSNorm(self.norm_eps, groups=G, name="o_norm")
        o_BTGE = norm(o_BTHV.reshape(B, T, H * V))
        y_BTD = self.merge_heads(o_BTGE, use_bias=self.use_bias)
        return y_BTD, State(S_BHKV, x_tail, B_tail, C_tail)

    def init_state(self, batch):
        G, H, K, V = self._sizes()
        widths = (H * V, G * K, G * K)
        tails = (self.conv_tail(batch, self.conv_width, width) for width in widths)
        return State(jnp.zeros((batch, H, K, V), jnp.float32), *tails)
