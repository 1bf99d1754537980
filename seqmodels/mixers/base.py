"""Base classes of token mixers: their interface, and code that they share."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType, LogicalAxes, State
from seqmodels.modules import layers, short_conv


@flax.struct.dataclass
class Layer:
    """Fields that tell a mixer its layer's place in the stack; a language model passes them.

    Attributes:
      index: the layer's index from 0, a traced scalar under scan over layers.
      count: number of layers in the stack.
      lower_bound_D: a learned lower bound of forget gates that grows from layer to layer (HGRN,
        HGRN2); None for mixers whose class does not set `uses_lower_bound`.
      coordinates_BTA: each token's place on A axes, (B, T, A) int32, in a point set or on a grid
        whose tokens come in another order; None places a document's tokens row by row on `grid`.
      condition_BTD: what a denoiser's layers are conditioned on (`blocks.Block`), (B, T, D) or
        (B, 1, D); mixers do not read it.
    """

    index: int | Array
    count: int = flax.struct.field(pytree_node=False)
    lower_bound_D: Array | None = None
    coordinates_BTA: Array | None = None
    condition_BTD: Array | None = None


@flax.struct.dataclass
class PositionedState:
    """Fields of a recurrent state: a matrix S_BHKV, and the next token's place in its document."""

    S_BHKV: Array
    next_position_B: Array

    @classmethod
    def empty(cls, *shape_BHKV: int) -> "PositionedState":
        """Returns the state before the first token: zeros of this shape, and position 0."""
        return cls(jnp.zeros(shape_BHKV, jnp.float32), jnp.zeros(shape_BHKV[:1], jnp.int32))


class Mixer(nn.Module):
    """A token mixer: y_BTD, state = mixer(x_BTD, segment_ids_BT=None, state=None, *, layer=None).

    Training, prefill and decoding are this one call with different T. `state` is a pytree whose
    size does not depend on T; None is the state before any token. A sequence that is fed in pieces,
    each with the state that the call before returned, gives the outputs of one call on the whole.
    A state that is passed in belongs to the document of the row's first token.

    Attributes:
      d_model: width D of input and output.
      dtype: dtype of matmuls and activations; states, gates and norms are always float32.
      param_dtype: dtype of the parameters, except those of gates, decays, norms and feature maps,
        which are float32.
      implementation: name of the operator's implementation, such as "chunked"; None picks the best.
    """

    d_model: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: str | None = None

    # Set by mixers that read Layer.lower_bound_D, so that the language model makes the parameter.
    uses_lower_bound = False
    # False for mixers that see whole documents; a language model refuses them.
    causal = True
    # True for mixers whose weights belong to positions, so that they read `max_length` tokens.
    bounded = False

    def __call__(
        self,
        x_BTD: Array,
        segment_ids_BT: Array | None = None,
        state: State = None,
        *,
        layer: Layer | None = None,
    ) -> tuple[Array, State]:
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def init_state(self, batch: int) -> State:
        """Returns the state of `batch` rows before any token; works on an unbound module."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def lower_bound_width(self) -> int:
        """Returns the width of `Layer.lower_bound_D`; 0 for mixers that do not read it."""
        return self.d_model if self.uses_lower_bound else 0

    @nn.nowrap
    def check_choice(self, option: str, choices: Collection[str]) -> None:
        """Raises ValueError, listing the choices, if the mixer's field `option` is none of them."""
        if (value := getattr(self, option)) not in choices:
            raise ValueError(
                f"{name_of(self)}: {option} is {value!r}; choose one of {', '.join(sorted(choices))}"
            )

    @nn.nowrap
    def width_per_head(self, heads: int, expand: float = 1.0) -> int:
        """Returns expand * d_model / heads, the number of channels of each head.

        Raises ValueError if the number of heads does not divide the channels.
        """
        width = int(self.d_model * expand)
        if width % heads:
            what = f"d_model {width}" if expand == 1.0 else f"{expand} * d_model = {width}"
            instead = ", or set head_dim" if hasattr(self, "head_dim") else ""
            raise ValueError(f"{name_of(self)}: num_heads {heads} must divide {what}{instead}")
        return width // heads

    @nn.nowrap
    def conv(self, width: int, **keywords) -> short_conv.ShortConv:
        """Makes a ShortConv of `width` taps in the mixer's dtypes; keywords: its other fields."""
        return short_conv.ShortConv(
            width, dtype=self.dtype, param_dtype=self.param_dtype, **keywords
        )

    def conv_tail(self, batch: int, width: int, features: int) -> Array:
        """Returns the state of a convolution of `width` taps before the first token: zeros."""
        return jnp.zeros((batch, width - 1, features), self.dtype)

    def project(
        self,
        x: Array,
        features: int,
        name: str,
        *,
        axes: LogicalAxes = ("embed", "heads"),
        use_bias: bool = False,
        **inits: Callable,
    ) -> Array:
        """Applies a Dense layer, whose parameters are called `name`, to x's last axis.

        axes: logical names of the kernel's axes, which the mesh's rules split.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return layers.dense(features, name, axes=axes, use_bias=use_bias, **inits, **dtypes)(x)

    def project_heads(self, x: Array, heads: int, dim: int, name: str, **keywords) -> Array:
        """Projects x (B, T, D) by a Dense layer called `name` to heads: (B, T, heads, dim)."""
        y = self.project(x, heads * dim, name, **keywords)
        return y.reshape(*y.shape[:-1], heads, dim)

    def merge_heads(self, o_BTHV: Array, name: str = "o", **keywords) -> Array:
        """Projects the outputs of all heads together to y_BTD, by a Dense layer called `name`."""
        o_BTE = o_BTHV.reshape(*o_BTHV.shape[:2], -1)
        return self.project(o_BTE, self.d_model, name, axes=("heads", "embed"), **keywords)


class WholeDocumentMixer(Mixer):
    """Base class of mixers that see a whole document at once, without an order in time.

    Documents are runs of equal segment ids and never touch. There is no state: a call returns
    (y_BTD, None).

    Attributes:
      grid: sizes of the axes that a document's tokens lie on, the last axis the fastest, such as
        (height, width) or (frames, height, width); None is one axis of any length. An encoder sets
        it for all of its mixers.
    """

    grid: tuple[int, ...] | None = None

    causal = False
    # False promises that permuting a document's tokens permutes its outputs, whatever the grid.
    uses_positions = True

    def init_state(self, batch: int) -> State:
        raise ValueError(
            f"{name_of(self)} sees whole documents and has no state to decode from: use it in an "
            "encoder or a denoiser, or take a causal mixer"
        )

    @nn.nowrap
    def check_no_state(self, state: State) -> None:
        """Raises ValueError if a state was passed to a mixer that has none."""
        if state is not None:
            self.init_state(0)


def name_of(mixer: Mixer) -> str:
    """Returns the mixer's registered name, which is its file's name."""
    return type(mixer).__module__.rpartition(".")[2]


class ChunkedMixer(Mixer):
    """Base class of mixers whose operator computes chunks of tokens in parallel.

    Attributes:
      chunk_size: tokens per chunk, a power of two of at least 16; None leaves the choice to the
        operator's implementation. It changes only speed and rounding.
    """

    chunk_size: int | None = None

    @nn.nowrap
    def recurrence_keywords(self, initial_state, segment_ids_BT) -> dict[str, Any]:
        """Returns the keywords of the operator's call that do not depend on the mixer's formula."""
        return {
            "initial_state": initial_state,
            "segment_ids": segment_ids_BT,
            "chunk_size": self.chunk_size,
            "implementation": self.implementation,
        }
