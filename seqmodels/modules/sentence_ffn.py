"""A shallow feed-forward network over a whole flattened sentence."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers, token_mlp

# name: s, where a network over W numbers has W / s hidden units.
SIZES = {"xs": 256.0, "s": 128.0, "m": 8.0, "l": 2.0, "xl": 0.5}


class SentenceFFN(nn.Module):
    """Makes H networks side by side over W numbers: a call returns their function x_NW -> y_NHO.

        y_h = Lin_down Norm(LeakyReLU(Lin_up Norm(x)))

    Attributes:
      inputs, hidden, outputs: W, the number of hidden units, and O.
      networks: H; each has weights of its own.
      eps: epsilon of the norms, which are LayerNorms with gain and bias.
    """

    inputs: int
    hidden: int
    outputs: int
    networks: int = 1
    eps: float = 1e-5
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self) -> Callable[[Array], Array]:
        H, W, F, O = self.networks, self.inputs, self.hidden, self.outputs
        up = self._affine("up", (H, W, F), (None, "mlp"))
        down = self._affine("down", (H, F, O), ("mlp", None))
        norm_in, norm_hidden = self._norm("norm", W), self._norm("hidden_norm", F)

        def network(x_NW):
            hidden_NHF = up(norm_in(x_NW[:, None]))
            return down(norm_hidden(jax.nn.leaky_relu(hidden_NHF)))

        # Only the sentences are saved for the backward pass.
        return layers.recomputed(network)

    def _affine(self, name, shape, axes) -> Callable[[Array], Array]:
        made = token_mlp.Affine(shape, axes, param_dtype=self.param_dtype, name=name)()
        kernel_HXY, bias_HY = (w.astype(self.dtype) for w in made)
        return lambda x_NHX: jnp.einsum("NHX,HXY->NHY", x_NHX, kernel_HXY) + bias_HY[None]

    def _norm(self, name: str, width: int) -> Callable[[Array], Array]:
        shape = (self.networks, width)
        gain_HX, bias_HX = (
            self.param(f"{name}_{which}", layers.undecayed(init, (None, "norm")), shape)
            for which, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )

        def norm(x_NHX):
            x = x_NHX.astype(jnp.float32)
            centred = x - jnp.mean(x, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            y_NHX = centred * lax.rsqrt(variance + self.eps) * gain_HX[None] + bias_HX[None]
            return y_NHX.astype(self.dtype)

        return norm


def hidden_units(name: str, size: str, inputs: int) -> int:
    """Returns the number of hidden units of a network over W = `inputs` numbers, W / s.

    size: a name of SIZES. name: the mixer's. Raises ValueError for another, or if W < s.
    """
    if size not in SIZES:
        choices = ", ".join(f"{size!r} (s = {s:g})" for size, s in SIZES.items())
        raise ValueError(f"{name}: size is {size!r}; choose one of {choices}")
    hidden = int(inputs / SIZES[size])
    if hidden < 1:
        raise ValueError(
            f"{name}: size {size!r} has W / {SIZES[size]:g} hidden units, and W = max_length * "
            f"d_model = {inputs} is less: take a larger size, or longer documents"
        )
    return hidden
