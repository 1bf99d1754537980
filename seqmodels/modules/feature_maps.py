"""Feature maps phi of linear attention by name: they replace softmax's exp(q . k).

`FeatureMap(name)` is a Linen module; maps without parameters are modules with none. x_BTHK becomes
phi_BTHF.

    name              phi(x)                                          F    source
    identity          x                                               K
    elu               elu(x): negative weights allowed                K    arXiv 2210.10340, T1
    elu_plus_one      elu(x) + 1                                      K    arXiv 2006.16236, eq. 7
    relu              relu(x)                                         K
    silu              x sigmoid(x)                                    K    arXiv 2307.14995
    softmax           softmax(x)                                      K    arXiv 1812.01243
    t2r               relu(W x + b), b one number per head            E    arXiv 2103.13076, eq. 6
    hedgehog_paper    exp(z) || exp(-z), z = W x + b                  2E   arXiv 2402.04347, eq. 6
    hedgehog_softmax  max(softmax(z) || softmax(-z), 1e-12), z = W x  2E   LoLCATs, arXiv 2410.10254
    hedgehog_joint    softmax(2 z || -2 z), z = W x + b               2E   flash-linear-attention
    norm_power        relu(u)^p || relu(-u)^p, u = x / |x|,           2K   NaLaFormer's queries,
                      p = 3 (1/2 + tanh |x|)                               arXiv 2506.21137
    signed_cube       relu(x)^3 || relu(-x)^3                         2K   NaLaFormer's keys

The three Hedgehog forms differ: phi sums to 2 in hedgehog_softmax, to 1 in hedgehog_joint, and is
  not normalised in hedgehog_paper, which overflows float32 where |z| > 88.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers


def _elu_plus_one(x: Array) -> Array:
    return jax.nn.elu(x) + 1.0


def _both_signs(f: Callable[[Array], Array], z: Array) -> Array:
    return jnp.concatenate([f(z), f(-z)], axis=-1)


def _hedgehog_paper(z: Array) -> Array:
    return _both_signs(jnp.exp, z)


def _hedgehog_softmax(z: Array) -> Array:
    return jnp.maximum(_both_signs(jax.nn.softmax, z), 1e-12)  # the floor is part of the definition


def _hedgehog_joint(z: Array) -> Array:
    return jax.nn.softmax(_both_signs(lambda z: 2.0 * z, z), axis=-1)


def _norm_power(x: Array) -> Array:
    # The smallest normal number keeps 0 / 0 out, at which the code of NaLaFormer gives NaN.
    tiny = jnp.finfo(x.dtype).tiny
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + tiny)
    power = 3.0 * (0.5 + jnp.tanh(norm))
    return _both_signs(lambda u: jax.nn.relu(u) ** power, x / norm)


def _signed_cube(x: Array) -> Array:
    return _both_signs(jax.nn.relu, x**3)


def rectangular_identity(key: Array, shape: tuple[int, ...], dtype: DType = jnp.float32) -> Array:
    """Initializes each head's matrix (K, E) to 1 on its diagonal and 0 elsewhere."""
    del key
    return jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)


# U(-sqrt(6/K), sqrt(6/K)) per head.
_KAIMING = nn.initializers.he_uniform(in_axis=-2, out_axis=-1, batch_axis=0)


@dataclasses.dataclass(frozen=True)
class _Map:
    """Fields of a feature map phi(x) = function(W x + b) from K to F channels per head.

    Attributes:
      nonnegative: whether phi(x) >= 0 for every x.
      kernel_init: initializer of W, (K, E) per head; None is a map without W.
      bias: the shape of b, "channel" (H, E) or "head" (H, 1); None is no bias.
      width: F / E, or F / K without W.
    """

    function: Callable[[Array], Array]
    nonnegative: bool
    kernel_init: Callable | None = None
    bias: str | None = None
    width: int = 1


_MAPS = {
    "identity": _Map(jax.nn.identity, nonnegative=False),
    "elu": _Map(jax.nn.elu, nonnegative=False),
    "elu_plus_one": _Map(_elu_plus_one, nonnegative=True),
    "relu": _Map(jax.nn.relu, nonnegative=True),
    "silu": _Map(jax.nn.silu, nonnegative=False),
    "softmax": _Map(jax.nn.softmax, nonnegative=True),
    "t2r": _Map(jax.nn.relu, True, _KAIMING, "head"),
    "hedgehog_paper": _Map(_hedgehog_paper, True, rectangular_identity, "channel", 2),
    "hedgehog_softmax": _Map(_hedgehog_softmax, True, rectangular_identity, None, 2),
    "hedgehog_joint": _Map(_hedgehog_joint, True, rectangular_identity, "channel", 2),
    "norm_power": _Map(_norm_power, nonnegative=True, width=2),
    "signed_cube": _Map(_signed_cube, nonnegative=True, width=2),
}


def names() -> list[str]:
    """Returns the name of every feature map."""
    return sorted(_MAPS)


def _get(name: str) -> _Map:
    if name not in _MAPS:
        raise ValueError(f"unknown feature map {name!r}; choose one of {', '.join(names())}")
    return _MAPS[name]


def is_nonnegative(name: str) -> bool:
    """Returns whether the feature map `name` is never negative, as a normaliser requires.

    Raises ValueError for an unknown name.
    """
    return _get(name).nonnegative


def output_dim(name: str, K: int, features: int | None = None) -> int:
    """Returns F, the number of features per head that the map `name` makes of K channels.

    features: the width E of a learned map's matrix; None is K. Raises ValueError for an unknown
      name.
    """
    feature_map = _get(name)
    return feature_map.width * (K if feature_map.kernel_init is None else features or K)


class FeatureMap(nn.Module):
    """A feature map from x_BTHK to phi_BTHF; a learned one has W_HKE, and b, for each head.

    W starts as the identity (for t2r Kaiming uniform), and b at 0. Parameters and computation are
    float32; phi has x's dtype.

    Attributes:
      kind: a name of the module's table, such as "elu_plus_one".
      features: the width E of a learned W; None is K.
    """

    kind: str
    features: int | None = None

    @nn.compact
    def __call__(self, x_BTHK: Array) -> Array:
        feature_map = _get(self.kind)
        z = x_BTHK.astype(jnp.float32)
        if feature_map.kernel_init is not None:
            H, K = x_BTHK.shape[2:]
            E = self.features or K
            init = layers.partitioned(feature_map.kernel_init, ("heads", None, None))
            W_HKE = self.param("kernel", init, (H, K, E), jnp.float32)
            z = jnp.einsum("BTHK,HKE->BTHE", z, W_HKE)
            if feature_map.bias is not None:
                shape = (H, E if feature_map.bias == "channel" else 1)
                init = layers.undecayed(nn.initializers.zeros, ("heads", None))
                z = z + self.param("bias", init, shape, jnp.float32)[None, None]
        return feature_map.function(z).astype(x_BTHK.dtype)
