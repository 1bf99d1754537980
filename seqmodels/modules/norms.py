"""Normalisations, computed in float32 and returned in the input's dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.common import matmul
from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers


class RMSNorm(nn.Module):
    """RMSNorm: y = x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467, eq. 4).

    The gain `scale` starts at 1 and has the shape of the last axis, so that the heads of x_BTHV
    share it.

    Attributes:
      use_scale: whether there is a gain.
      groups: number of equal groups of channels in the last axis, each with its own mean; `scale`
        has one number for each channel of all groups.
      zero_centred: whether the gain is 1 + scale, scale starting at 0 (Gemma, arXiv 2403.08295).
    """

    eps: float = 1e-5
    use_scale: bool = True
    groups: int = 1
    zero_centred: bool = False
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gain = None
        if self.use_scale:
            start = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
            init = layers.undecayed(start, ("norm",))
            scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
            gain = scale.astype(jnp.float32) + float(self.zero_centred)
        return layers.recomputed(self._normed)(x, gain)

    def _normed(self, x: Array, gain: Array | None) -> Array:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        y = srms_norm(grouped, self.eps).reshape(x.shape)
        if gain is not None:
            y = y * gain.reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (arXiv 1607.06450)."""

    eps: float = 1e-5
    use_bias: bool = True
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.LayerNorm(
            epsilon=self.eps,
            use_bias=self.use_bias,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            scale_init=layers.undecayed(nn.initializers.ones, ("norm",)),
            bias_init=layers.undecayed(nn.initializers.zeros, ("norm",)),
            name="norm",
        )
        return norm(x).astype(x.dtype)


def srms_norm(x: Array, eps: float = 1e-5) -> Array:
    """Computes x / sqrt(mean(x^2) + eps), without a gain (TransNormerLLM, arXiv 2307.14995)."""
    mean = matmul.sum_last(jnp.square(x)) / x.shape[-1]
    return matmul.scaled(x, jax.lax.rsqrt(mean + eps))


def l2_norm(x: Array, eps: float = 1e-6) -> Array:
    """Computes x / sqrt(sum(x^2) + eps) over the last axis, in float32; returns x's dtype."""

    def normed(x):
        x_f32 = x.astype(jnp.float32)
        squared = matmul.sum_last(jnp.square(x_f32))
        return matmul.scaled(x_f32, jax.lax.rsqrt(squared + eps)).astype(x.dtype)

    return layers.recomputed(normed)(x)


NORMS = {
    "rms_norm": RMSNorm,
    "layer_norm": LayerNorm,
    "srms_norm": lambda **keywords: RMSNorm(use_scale=False, **keywords),
    "zero_centred_rms_norm": lambda **keywords: RMSNorm(zero_centred=True, **keywords),
}
