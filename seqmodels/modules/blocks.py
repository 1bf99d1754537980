"""A layer of a model: token mixer and channel mixer, each with norm and residual connection."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import mixers, sharding
from seqmodels.array_typing import Array, DType, State
from seqmodels.modules import channel_mixers, grids, layers, norms
from seqmodels.modules.pattern import MixerSpec

NORM_POSITIONS = ("pre", "post", "sandwich", "residual")
# Options of a layer, not of its mixer, in a pattern: "gla(channel_mixer='moe(num_experts=8)')".
LAYER_OPTIONS = (
    "channel_mixer", "d_ff", "mixer_residual", "channel_residual", "position_conv",
)  # fmt: skip


class Block(nn.Module):
    """A layer of a model: x <- x + mixer(norm(x)); x <- x + channel_mixer(norm(x)).

    With a condition c, `layer.condition_BTD`, the layer is a DiT block with adaLN-zero (arXiv
    2212.09748, section 3.2): for each mixer, (shift, scale, gate) = W silu(c) + b, and
    x <- x + gate * mixer(norm(x) * (1 + scale) + shift). W and b start at 0: then x stays x.

    Attributes:
      spec: name and options of the token mixer, and the layer's own options (LAYER_OPTIONS).
      channel_mixer: a text for `channel_mixers.make`; None leaves it out (Mamba). Channel mixers
        whose class sets `uses_tokens` are called with the segment ids too.
      d_ff, channel_bias: the channel mixer's hidden width, and whether its projections have biases.
      norm, norm_eps: a text for `norms.make`, and that norm's epsilon.
      norm_position: where f, either mixer, is normed: "pre" as above; "post" x <- norm(x + f(x));
        "sandwich" x <- x + norm(f(norm(x))); "residual" x <- norm(x); x <- x + f(x) (MiniMax-01,
        arXiv 2501.08313).
      mixer_residual, channel_residual: weights (a, b) of x <- a x + b f(x) for each mixer.
      grid: sizes of a document's axes, for mixers and channel mixers that have this field and
        whose own options leave it out.
      position_conv: taps per axis of a depthwise convolution on the grid, x <- x + conv(x), before
        each mixer (conditional positions, arXiv 2102.10882); None leaves it out.
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
    grid: tuple[int, ...] | None = None
    position_conv: int | None = None

    @nn.nowrap
    def make_mixer(self, **keywords) -> mixers.Mixer:
        """Makes the layer's token mixer; options in `spec` override its width, dtypes and grid."""
        shared: dict[str, Any] = {"d_model": self.d_model}
        shared |= {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if "grid" in mixers.options(self.spec.name):
            shared["grid"] = self.grid
        own = {k: v for k, v in self.spec.options if k not in LAYER_OPTIONS}
        return mixers.make(self.spec.name, **(shared | own), **keywords)

    @nn.nowrap
    def make_channel_mixer(self, **keywords) -> nn.Module | None:
        """Makes the layer's channel mixer; returns None if it has none."""
        if (text := self._setting("channel_mixer")) is None:
            return None
        return channel_mixers.make(
            text,
            d_ff=self._setting("d_ff"),
            use_bias=self.channel_bias,
            grid=self.grid,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **keywords,
        )

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
        of_mixer, of_channels = self._modulations(layer.condition_BTD)

        def mix(h_BTD):
            return mixer(h_BTD, segment_ids_BT, state, layer=layer)

        x_BTD = self._with_position("mixer", x_BTD, segment_ids_BT, layer)
        x_BTD, state = self._residual("mixer", mix, x_BTD, segment_ids_BT, of_mixer)
        if (channels := self.make_channel_mixer(name="channel_mixer")) is not None:
            tokens = (segment_ids_BT,) if getattr(channels, "uses_tokens", False) else ()

            def transform(h_BTD):
                return channels(h_BTD, *tokens), None

            x_BTD = self._with_position("channel", x_BTD, segment_ids_BT, layer)
            x_BTD, _ = self._residual("channel", transform, x_BTD, segment_ids_BT, of_channels)
        return x_BTD, state

    def _modulations(self, condition_BTD: Array | None):
        """Returns (shift, scale, gate) of each of the two mixers; None without a condition."""
        if condition_BTD is None:
            return None, None
        parts = modulation(6, condition_BTD, self.dtype, self.param_dtype)
        return parts[:3], parts[3:]

    def _with_position(self, which: str, x_BTD: Array, segment_ids_BT, layer) -> Array:
        if (taps := self._setting("position_conv")) is None:
            return x_BTD
        conv = grids.DepthwiseConv(
            taps, self.grid, dtype=self.dtype, param_dtype=self.param_dtype,
            name=f"{which}_position_conv",
        )  # fmt: skip
        return x_BTD + conv(x_BTD.astype(self.dtype), segment_ids_BT, layer=layer)

    def _residual(
        self, which: str, f, x_BTD: Array, segment_ids_BT: Array | None, modulated
    ) -> tuple[Array, State]:
        name, weights = f"{which}_norm", tuple(self._setting(f"{which}_residual"))

        def norm(suffix, h_BTD):
            return norms.apply(self.norm, self.norm_eps, name + suffix, h_BTD, segment_ids_BT)

        h_BTD = x_BTD if self.norm_position == "post" else norm("", x_BTD)
        if self.norm_position == "residual":
            x_BTD = h_BTD
        if modulated is not None:
            shift_BTD, scale_BTD, gate_BTD = modulated
            h_BTD = h_BTD * (1.0 + scale_BTD) + shift_BTD
        y_BTD, state = f(h_BTD.astype(self.dtype))
        if modulated is not None:
            y_BTD = gate_BTD * y_BTD
        if self.norm_position == "sandwich":
            y_BTD = norm("_after", y_BTD)
        if weights != (1.0, 1.0):
            x_BTD, y_BTD = x_BTD * weights[0], y_BTD * weights[1]
        x_BTD = sharding.constrain(x_BTD + y_BTD)
        return (norm("", x_BTD) if self.norm_position == "post" else x_BTD), state


def modulation(parts: int, condition_BTD: Array, dtype: DType, param_dtype: DType) -> list[Array]:
    """Makes adaLN's layer in the calling module; returns its `parts` outputs, (B, T, D) each.

    They are W silu(c) + b, and W and b start at 0 (DiT, arXiv 2212.09748, section 3.2).
    """
    D = condition_BTD.shape[-1]
    dense = layers.dense(
        parts * D,
        "modulation",
        axes=("embed", None),
        kernel_init=nn.initializers.zeros,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return jnp.split(dense(jax.nn.silu(condition_BTD)), parts, axis=-1)


def options_of(module: nn.Module) -> dict[str, Any]:
    """Returns a block's fields but its spec, as far as another module has them."""
    names = {field.name for field in dataclasses.fields(Block)} - {"spec", "parent", "name"}
    return {name: getattr(module, name) for name in sorted(names) if hasattr(module, name)}


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
