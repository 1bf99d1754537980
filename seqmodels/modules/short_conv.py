"""The short causal convolution before the recurrence of most modern mixers."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers
from seqmodels.operators import causal_conv


def uniform_fan_in(width: int) -> Callable:
    """Returns the initializer U(-1/sqrt(width), 1/sqrt(width)), PyTorch's for convolutions."""

    def init(key, shape, dtype=jnp.float32):
        bound = width**-0.5
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


def identity_taps(key, shape, dtype=jnp.float32):
    """Initializes a convolution's kernel (I, D) to the identity y_t = x_t: last tap 1, others 0."""
    return jnp.zeros(shape, dtype).at[-1].set(1.0)


class ShortConv(nn.Module):
    """Depthwise causal convolution, then an activation, then the L2 norm of each head's channels.

        z_t = act(bias + sum_{i=0..I-1} w_i * x_{t-(I-1)+i})
        y_t = z_t / sqrt(sum z_t^2 + eps), the sum over a head's channels

    A call returns y_BTD and the state, which is the last I - 1 inputs, (B, I-1, D).

    Attributes:
      width: I, the number of taps.
      activation: act; None is the identity.
      l2_norm_heads: number of heads of D / l2_norm_heads channels that are normed, which takes silu
        or no activation; None leaves the norm out.
      kernel_init: initializer of w, with the bias at 0; None is `uniform_fan_in` for w and bias.
    """

    width: int = 4
    use_bias: bool = False
    activation: Callable[[Array], Array] | None = nn.silu
    l2_norm_heads: int | None = None
    kernel_init: Callable | None = None
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x_BTD: Array, segment_ids_BT: Array | None = None, state: Array | None = None
    ) -> tuple[Array, Array]:
        D = x_BTD.shape[-1]
        fused = self.activation is None or self.activation is nn.silu
        if not fused and self.l2_norm_heads is not None:
            raise ValueError("ShortConv: l2_norm_heads goes with activation=nn.silu or None")
        init = self.kernel_init or uniform_fan_in(self.width)
        w_ID = self.param(
            "kernel",
            layers.partitioned(init, (None, "heads")),
            (self.width, D),
            self.param_dtype,
        )
        bias_D = None
        if self.use_bias:
            bias_init = nn.initializers.zeros if self.kernel_init else init
            bias_init = layers.undecayed(bias_init, ("heads",))
            bias_D = self.param("bias", bias_init, (D,), self.param_dtype).astype(self.dtype)
        y_BTD, state = causal_conv(
            x_BTD.astype(self.dtype),
            w_ID.astype(self.dtype),
            bias=bias_D,
            activation="silu" if self.activation is nn.silu else None,
            l2_norm_heads=self.l2_norm_heads,
            initial_state=state,
            segment_ids=segment_ids_BT,
        )
        return (y_BTD if fused or self.activation is None else self.activation(y_BTD)), state
