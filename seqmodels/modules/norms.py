"""Normalisations, computed in float32 and returned in the input's dtype."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.common import matmul
from seqmodels import fields
from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers, pattern

STATISTICS = "batch_stats"  # the Flax collection of norms over batches


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
    """LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (arXiv 1607.06450).

    Attributes:
      use_scale, use_bias: whether there are a gain and a bias; DiT's norms have neither.
    """

    eps: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.LayerNorm(
            epsilon=self.eps,
            use_bias=self.use_bias,
            use_scale=self.use_scale,
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


class BatchNorm(nn.Module):
    """BatchNorm: y = (x - mean) / sqrt(var + eps) * scale + bias (arXiv 1502.03167, algorithm 1).

    Where the collection "batch_stats" is mutable, which means training, mean and var are those of
    each channel over all valid tokens of the batch, on all devices; running averages of them are
    kept in the collection, and used elsewhere. Valid tokens are those with a segment id above 0.

    Attributes:
      momentum: m of running <- m running + (1 - m) batch.
    """

    eps: float = 1e-5
    momentum: float = 0.9
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None) -> Array:
        D = x_BTD.shape[-1]
        wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        mean = self.variable(STATISTICS, "mean", jnp.zeros, (D,), jnp.float32)
        var = self.variable(STATISTICS, "var", jnp.ones, (D,), jnp.float32)
        mean_D, var_D = mean.value, var.value
        if is_training(self):
            mean_D, var_D = moments(wide_BTD, segment_ids_BT)
            for kept, now_D in ((mean, mean_D), (var, var_D)):
                now_D = jax.lax.stop_gradient(now_D).astype(jnp.float32)
                kept.value = self.momentum * kept.value + (1.0 - self.momentum) * now_D
        scale_D = self.param("scale", _gain(nn.initializers.ones), (D,), self.param_dtype)
        bias_D = self.param("bias", _gain(nn.initializers.zeros), (D,), self.param_dtype)
        factor_D = scale_D * jax.lax.rsqrt(var_D + self.eps)
        y_BTD = (wide_BTD - mean_D[None, None]) * factor_D[None, None] + bias_D[None, None]
        return y_BTD.astype(x_BTD.dtype)


class RepBN(nn.Module):
    """RepBN: y = BatchNorm(x) + alpha x, alpha a learned scalar that starts at 1.

    In evaluation it is one factor and one offset per channel, which `folding.fold` moves into the
    next linear layer (SLAB, arXiv 2405.11582). Attributes are those of BatchNorm.
    """

    eps: float = 1e-5
    momentum: float = 0.9
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None) -> Array:
        norm = BatchNorm(self.eps, self.momentum, self.param_dtype, name="norm")
        alpha = self.param("alpha", _gain(nn.initializers.ones, ()), (), jnp.float32)
        return norm(x_BTD, segment_ids_BT) + alpha.astype(x_BTD.dtype) * x_BTD


class PRepBN(nn.Module):
    """Progressive re-parameterized BatchNorm (SLAB, arXiv 2405.11582):

        y = lambda LayerNorm(x) + (1 - lambda) RepBN(x)

    lambda falls linearly from 1 to 0 over `steps` calls in training, which are counted in
    "batch_stats" (a step with n microbatches has n calls). In evaluation y = RepBN(x), whatever
    lambda is, as in the authors' code.

    Attributes:
      steps: calls over which lambda falls. The authors' default is 300,000.
      warmup: calls with lambda 1 before that.
      momentum: of RepBN's running statistics.
    """

    eps: float = 1e-5
    steps: int = 300_000
    warmup: int = 0
    momentum: float = 0.9
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None) -> Array:
        if self.steps < 1 or self.warmup < 0:
            raise ValueError(
                f"prepbn: steps is {self.steps} and warmup {self.warmup}; they must be at least 1 "
                "and 0"
            )
        count = self.variable(STATISTICS, "count", jnp.zeros, (), jnp.int32)
        rep_BTD = RepBN(self.eps, self.momentum, self.param_dtype, name="rep")(
            x_BTD, segment_ids_BT
        )
        training = is_training(self)
        if not (training or self.is_initializing()):
            return rep_BTD
        share = 1.0 - (count.value - self.warmup) / self.steps
        share = jnp.clip(share, 0.0, 1.0).astype(x_BTD.dtype)
        if training:
            count.value = count.value + 1
        norm = LayerNorm(self.eps, param_dtype=self.param_dtype, name="layer")
        return share * norm(x_BTD) + (1.0 - share) * rep_BTD


class Identity(nn.Module):
    """No norm: y = x. It stands in a model whose norms were folded into the next layers."""

    eps: float = 1e-5

    def __call__(self, x: Array) -> Array:
        return x


def is_training(module: nn.Module) -> bool:
    """Returns whether batch norms of this call take a batch's statistics, and update their own."""
    return module.is_mutable_collection(STATISTICS) and not module.is_initializing()


def moments(x_BTD: Array, segment_ids_BT: Array | None) -> tuple[Array, Array]:
    """Returns mean and variance of each channel over the valid tokens of a batch, (D,) each."""
    if segment_ids_BT is None:
        return jnp.mean(x_BTD, axis=(0, 1)), jnp.var(x_BTD, axis=(0, 1))
    valid_BT1 = (segment_ids_BT > 0)[..., None]
    count = jnp.maximum(jnp.sum(valid_BT1), 1)
    mean_D = jnp.sum(jnp.where(valid_BT1, x_BTD, 0.0), axis=(0, 1)) / count
    centred_BTD = jnp.where(valid_BT1, x_BTD - mean_D[None, None], 0.0)
    return mean_D, jnp.sum(jnp.square(centred_BTD), axis=(0, 1)) / count


def _gain(init: Callable, axes: tuple = ("norm",)) -> Callable:
    return layers.undecayed(init, axes)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms_norm": RMSNorm,
    "layer_norm": LayerNorm,
    "srms_norm": functools.partial(RMSNorm, use_scale=False),
    "zero_centred_rms_norm": functools.partial(RMSNorm, zero_centred=True),
}
# Norms by statistics over the tokens of batches, which are called with the segment ids too.
BATCH_NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch_norm": BatchNorm,
    "rep_bn": RepBN,
    "prepbn": PRepBN,
}
_ALL = NORMS | BATCH_NORMS | {"identity": Identity}


def make(text: str, eps: float, **keywords) -> nn.Module:
    """Makes the norm that `text` names, with options as in a pattern: "prepbn(steps=300)".

    keywords: Flax's name and parent.

    Raises ValueError for an unknown norm or option, with the choices listed, or an option of the
    wrong type.
    """
    name, options = _parsed(text)
    made = _ALL[name]
    kind: Any = made.func if isinstance(made, functools.partial) else made
    known = {f.name for f in dataclasses.fields(kind)} - {"parent", "name", "eps", "param_dtype"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"norm {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
    kinds = typing.get_type_hints(kind)
    for option, value in options.items():
        fields.checked(f"{option} of norm {name}", value, kinds[option])
    return made(eps=eps, **options, **keywords)


def apply(
    text: str, eps: float, name: str, x_BTD: Array, segment_ids_BT: Array | None = None
) -> Array:
    """Makes the norm `text` with parameters called `name` in the calling module, and applies it."""
    norm = make(text, eps, name=name)
    return norm(x_BTD, segment_ids_BT) if uses_tokens(text) else norm(x_BTD)


def uses_tokens(text: str) -> bool:
    """Returns whether the norm `text` depends on other tokens, of the batch or of earlier ones."""
    return _parsed(text)[0] in BATCH_NORMS


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    specs = pattern.parse(text) if isinstance(text, str) else []
    if len(specs) != 1 or specs[0].name not in _ALL:
        raise ValueError(f"norm is {text!r}; choose one of {', '.join(_ALL)}")
    return specs[0].name, dict(specs[0].options)
