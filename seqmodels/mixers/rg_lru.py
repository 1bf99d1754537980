"""Griffin's recurrent block: a convolution and the real-gated linear recurrent unit."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base, gates
from seqmodels.modules import layers

DECAY_POWER = 8.0  # c
MAX_SQRT_GRADIENT = 1000.0


@flax.struct.dataclass
class State:
    """Fields of Griffin's recurrent state.

    Attributes:
      h_BE: the recurrence's state.
      x_tail: the last inputs of the convolution.
      begun_B: whether a token of the document was read; the first one is not scaled by
        sqrt(1 - a^2).
    """

    h_BE: Array
    x_tail: Array
    begun_B: Array


class RGLRU(base.Mixer):
    """RG-LRU in Griffin's recurrent block (De et al., arXiv 2402.19427, section 2.4).

        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)
        log a_t = -c softplus(Lambda) * r_t, c = 8

    x = conv(W_x u + b_x) + b_c of the layer's input u, without an activation; r, i =
    sigmoid(W x + b), where W is block-diagonal with one block per head; y = W_o (h * gelu(W_g u +
    b_g)) + b_o. A document's first token is not scaled by sqrt(1 - a^2). At the start
    exp(-c softplus(Lambda)), which is a_t where r_t = 1, is ~ U(0.9, 0.999).

    Attributes:
      num_heads: H, the number of blocks of W in the two gates.
      lru_width: E, the width of x and h; None is D.
      conv_width: number of taps.
    """

    num_heads: int = 4
    lru_width: int | None = None
    conv_width: int = 4

    def _width(self) -> int:
        E, H = self.lru_width or self.d_model, self.num_heads
        if E % H:
            raise ValueError(f"rg_lru: num_heads {H} must divide lru_width {E}")
        return E

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        E = self._width()
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        conv = self.conv(self.conv_width, use_bias=True, activation=None, name="x_conv")
        x_BTE = self.project(x_BTD, E, "x", use_bias=True)
        x_BTE, x_tail = conv(x_BTE, segment_ids_BT, state.x_tail)
        r_BTE = jax.nn.sigmoid(self._block_diagonal(x_BTE, "r").astype(jnp.float32))
        i_BTE = jax.nn.sigmoid(self._block_diagonal(x_BTE, "i").astype(jnp.float32))
        Lambda_E = layers.gate_parameter(self, "Lambda", _decay_init, (E,))
        log_a_BTE = -DECAY_POWER * jax.nn.softplus(Lambda_E)[None, None] * r_BTE

        # A document's first token enters whole, the others scaled by sqrt(1 - a^2).
        first_BT = (jnp.arange(x_BTD.shape[1]) == 0)[None] & ~state.begun_B[:, None]
        if segment_ids_BT is not None:
            first_BT |= operators.starts(segment_ids_BT)
        scale_BTE = sqrt_bounded_gradient(-jnp.expm1(2.0 * log_a_BTE))
        scale_BTE = jnp.where(first_BT[..., None], 1.0, scale_BTE)
        h_BTE, h_BE = operators.diagonal_scan(
            scale_BTE * i_BTE * x_BTE,
            log_decay=log_a_BTE,
            initial_state=state.h_BE,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        gate_BTE = self.project(x_BTD, E, "g", use_bias=True)
        o_BTE = layers.gated(h_BTE.astype(self.dtype), gate_BTE, nn.gelu)
        y_BTD = self.project(o_BTE, self.d_model, "o", axes=("heads", "embed"), use_bias=True)
        return y_BTD, State(h_BE, x_tail, jnp.ones_like(state.begun_B))

    def _block_diagonal(self, x_BTE: Array, name: str) -> Array:
        B, T, E = x_BTE.shape
        H = self.num_heads
        kernel_init = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel_HKV = self.param(
            f"{name}_kernel",
            layers.partitioned(kernel_init, ("heads", None, None)),
            (H, E // H, E // H),
            self.param_dtype,
        )
        bias_HV = self.param(
            f"{name}_bias",
            layers.undecayed(nn.initializers.zeros, ("heads", None)),
            (H, E // H),
            self.param_dtype,
        )
        x_BTHK, kernel_HKV, bias_HV = dtypes.promote_dtype(
            x_BTE.reshape(B, T, H, E // H), kernel_HKV, bias_HV, dtype=self.dtype
        )
        y_BTHV = jnp.einsum("BTHK,HKV->BTHV", x_BTHK, kernel_HKV) + bias_HV[None, None]
        return y_BTHV.reshape(B, T, E)

    def init_state(self, batch):
        E = self._width()
        return State(
            h_BE=jnp.zeros((batch, E), jnp.float32),
            x_tail=self.conv_tail(batch, self.conv_width, E),
            begun_B=jnp.zeros((batch,), bool),
        )


def _decay_init(key, shape, dtype=jnp.float32):
    """Initializes RG-LRU's Lambda so that exp(-c softplus(Lambda)) ~ U(0.9, 0.999), c = 8."""
    a = jax.random.uniform(key, shape, dtype, 0.9, 0.999)
    return gates.inverse_softplus(-jnp.log(a) / DECAY_POWER)


@jax.custom_jvp
def sqrt_bounded_gradient(x: Array) -> Array:
    """Computes sqrt(x) for x >= 0; its derivative 1 / (2 sqrt(x)) is capped at 1000."""
    return jnp.sqrt(x)


@sqrt_bounded_gradient.defjvp
def _sqrt_bounded_gradient_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    smallest = 0.25 / MAX_SQRT_GRADIENT**2
    return jnp.sqrt(x), 0.5 * jax.lax.rsqrt(jnp.maximum(x, smallest)) * dx
