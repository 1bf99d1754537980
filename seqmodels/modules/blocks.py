"""A layer of a model: token mixer and channel mixer, each with norm and residual connection."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import mixers, sharding
from seqmodels.array_typing import Array, DType, State
from seqmodels.modules import channel_mixers, norms
from seqmodels.modules.pattern import MixerSpec

NORM_POSITIONS = ("pre", "post", "sandwich", "residual")
# Options of a layer, not of its mixer, in a pattern: "gla(channel_mixer='moe(num_experts=8)')".
LAYER_OPTIONS = ("channel_mixer", "d_ff", "mixer_residual", "channel_residual")


class Block(nn.Module):
    """A layer of a language model: x <- x + mixer(norm(x)); x <- x + channel_mixer(norm(x)).

    Attributes:
      spec: name and options of the token mixer, and the layer's own options (LAYER_OPTIONS).
      channel_mixer: a text for `channel_mixers.make`; None leaves it out (Mamba).
      d_ff, channel_bias: the channel mixer's hidden width, and whether its projections have biases.
      norm, norm_eps: a name of `norms.NORMS`, and that norm's epsilon.
      norm_position: where f, either mixer, is normed: "pre" as above; "post" x <- norm(x + f(x));
        "sandwich" x <- x + norm(f(norm(x))); "residual" x <- norm(x); x <- x + f(x) (MiniMax-01,
        arXiv 2501.08313).
      mixer_residual, channel_residual: weights (a, b) of x <- a x + b f(x) for each mixer.
    """

    spec: MixerSpec
    d_model: int
    channel_mixer: str | None = "swiglu"
    d_ff: int | None = None
    channel_bias: bool = False
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    mixer_residual: tuple[float, float] = (1.0, 1.0)
    channel_residual: tuple[float, float] = (1.0, 1.0)
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.nowrap
    def make_mixer(self, **keywords) -> mixers.Mixer:
        """Makes the layer's token mixer; options in `spec` override its width and dtypes."""
        shared = {"d_model": self.d_model, "dtype": self.dtype, "param_dtype": self.param_dtype}
        own = {k: v for k, v in self.spec.options if k not in LAYER_OPTIONS}
        return mixers.make(self.spec.name, **(shared | own), **keywords)

    @nn.nowrap
    def _setting(self, name: str):
        """Returns the value of an option: the one in `spec` if there is one, else the field's."""
        return dict(self.spec.options).get(name, getattr(self, name))

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        segment_ids_BT: Array | None,
        state: State,
        fresh_B: Array | None,
        layer: mixers.Layer,
    ) -> tuple[Array, State]:
        mixer = self.make_mixer(name="mixer")
        if fresh_B is not None:
            state = clear_rows(state, mixer.init_state(x_BTD.shape[0]), fresh_B)

        def mix(h_BTD):
            return mixer(h_BTD, segment_ids_BT, state, layer=layer)

        x_BTD, state = self._residual("mixer", mix, x_BTD)
        if (channel_mixer := self._setting("channel_mixer")) is not None:
            channels = channel_mixers.make(
                channel_mixer,
                d_ff=self._setting("d_ff"),
                use_bias=self.channel_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="channel_mixer",
            )
            x_BTD, _ = self._residual("channel", lambda h_BTD: (channels(h_BTD), None), x_BTD)
        return x_BTD, state

    def _residual(self, which: str, f, x_BTD: Array) -> tuple[Array, State]:
        name, weights = f"{which}_norm", tuple(self._setting(f"{which}_residual"))

        def norm(suffix, h_BTD):
            return make_norm(self.norm, self.norm_eps, name + suffix)(h_BTD)

        h_BTD = x_BTD if self.norm_position == "post" else norm("", x_BTD)
        if self.norm_position == "residual":
            x_BTD = h_BTD
        y_BTD, state = f(h_BTD.astype(self.dtype))
        if self.norm_position == "sandwich":
            y_BTD = norm("_after", y_BTD)
        if weights != (1.0, 1.0):
            x_BTD, y_BTD = x_BTD * weights[0], y_BTD * weights[1]
        x_BTD = sharding.constrain(x_BTD + y_BTD)
        return (norm("", x_BTD) if self.norm_position == "post" else x_BTD), state


def options_of(module: nn.Module) -> dict[str, Any]:
    """Returns a block's fields but its spec, as another module has them."""
    names = {field.name for field in dataclasses.fields(Block)} - {"spec", "parent", "name"}
    return {name: getattr(module, name) for name in sorted(names)}


def make_norm(name: str, eps: float, module_name: str) -> nn.Module:
    """Makes the norm that `norms.NORMS` calls `name`, with parameters called `module_name`.

    Raises ValueError, listing the choices, for an unknown name.
    """
    if name not in norms.NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(sorted(norms.NORMS))}")
    return norms.NORMS[name](eps=eps, name=module_name)


def clear_rows(state: State, empty: State, rows_B: Array) -> State:
    """Returns a state whose rows are those of `empty` where rows_B (B,) is True.

    Scalar leaves, which have no batch axis, stay as they are.
    """

    def clear(leaf, empty_leaf):
        if leaf.ndim == 0:
            return leaf
        return jnp.where(rows_B.reshape((-1,) + (1,) * (leaf.ndim - 1)), empty_leaf, leaf)

    return jax.tree.map(clear, state, empty)


def take_rows(state: State, rows_N: Array, axis: int = 0) -> State:
    """Returns the rows of a state with the batch indices rows_N, in this order.

    axis: the batch axis of the leaves; leaves with too few axes to have it stay as they are.
    """
    return jax.tree.map(
        lambda leaf: leaf if leaf.ndim <= axis else jnp.take(leaf, rows_N, axis), state
    )
