"""Channel mixers: what acts on every token by itself, between two token mixers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import layers
from seqmodels.array_typing import Array, DType


def _identity(x: Array) -> Array:
    return x


# name: (activation of the gate or of the hidden layer, whether there is a gate)
_KINDS: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "swiglu": (jax.nn.silu, True),  # GLU variants, arXiv 2002.05202
    "geglu": (jax.nn.gelu, True),
    "sglu": (_identity, True),  # TransNormerLLM, arXiv 2307.14995, eq. 11: no activation
    "gelu": (jax.nn.gelu, False),
}


def names() -> list[str]:
    """Every channel mixer."""
    return sorted(_KINDS)


class ChannelMixer(nn.Module):
    """Gated kinds: W_down(act(W_gate x) * W_up x). Ungated: W_down act(W_up x).

    kind: swiglu, geglu, sglu (no activation) or gelu (no gate).
    d_ff: the hidden width F; None is 8/3 D for gated kinds (the parameters of an ungated 4 D), rounded up to a
      multiple of 64, and 4 D for ungated ones.
    """

    kind: str = "swiglu"
    d_ff: int | None = None
    use_bias: bool = False
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        if self.kind not in _KINDS:
            raise ValueError(
                f"unknown channel mixer {self.kind!r}; choose one of {', '.join(names())}"
            )
        activation, gated = _KINDS[self.kind]
        D = x_BTD.shape[-1]
        F = self.d_ff or (-(-8 * D // (3 * 64)) * 64 if gated else 4 * D)

        def dense(features, name, axes):
            return layers.dense(
                features,
                name,
                axes=axes,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

        up_BTF = dense(F, "up", ("embed", "mlp"))(x_BTD)
        if gated:
            hidden_BTF = activation(dense(F, "gate", ("embed", "mlp"))(x_BTD)) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        return dense(D, "down", ("mlp", "embed"))(hidden_BTF)
