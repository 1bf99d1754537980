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
    """Initializes to the identity, y_t = x_t: the last tap is the token's own."""
    return jnp.zeros(shape, dtype).at[-1].set(1.0)


class ShortConv(nn.Module):
    """Depthwise causal convolution, then an activation, then the L2 norm of each head's channels.

        z_t = act(bias + sum_i w_i * x_{t-(I-1)+i})
        y_t = z_t / sqrt(sum z_t^2 + eps), the sum over a head's channels

    The state is the last I - 1 inputs, (B, I-1, D).

    Attributes:
      width: I, the number of taps.
      activation: silu is computed with the convolution, any other after it.
      l2_norm_heads: heads of D / l2_norm_heads channels each; None: no norm.
      kernel_init: None is `uniform_fan_in`, for kernel and bias; with another one the bias starts
        at 0.
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
