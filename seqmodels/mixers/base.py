"""The interface of a token mixer, and code that mixers share."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType, LogicalAxes, State
from seqmodels.modules import layers, short_conv


@flax.struct.dataclass
class Layer:
    """A layer's place in the stack, given to mixers by the language model; None outside one.

    Attributes:
      index: 0-based, a traced scalar under scan over layers.
      count: number of layers L.
      lower_bound_D: the learned, layer-wise increasing forget-gate bound of HGRN and HGRN2, for
        mixers whose class sets `uses_lower_bound`.
    """

    index: int | Array
    count: int = flax.struct.field(pytree_node=False)
    lower_bound_D: Array | None = None


@flax.struct.dataclass
class PositionedState:
    """A state S_BHKV, and the position of the next token in its document."""

    S_BHKV: Array
    next_position_B: Array

    @classmethod
    def empty(cls, *shape_BHKV: int) -> "PositionedState":
        """Returns the state before the first token."""
        return cls(jnp.zeros(shape_BHKV, jnp.float32), jnp.zeros(shape_BHKV[:1], jnp.int32))


class Mixer(nn.Module):
    """A token mixer: y_BTD, state = mixer(x_BTD, segment_ids_BT=None, state=None, *, layer=None).

    Training, prefill and decoding are this one call with different T. `state` is a pytree of fixed
    size in T; None starts from nothing. Feeding a sequence in any pieces, each with the state the
    last one returned, gives what feeding it whole gives. A state that is passed in belongs to the
    document of the first token.

    Attributes:
      d_model: width D of input and output.
      dtype: of the matmuls and activations; states, gates and norms are float32 whatever it says.
      param_dtype: of the parameters, but for those that are used in float32: of gates, decays,
        norms and feature maps.
      implementation: the form of the operator to use; None picks the best.
    """

    d_model: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    implementation: str | None = None

    # Set by mixers that read Layer.lower_bound_D, so that the language model makes the parameter.
    uses_lower_bound = False

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
        """Returns the state before the first token. Works on an unbound module."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def lower_bound_width(self) -> int:
        """Returns the width of `Layer.lower_bound_D`, for mixers with `uses_lower_bound`."""
        return self.d_model

    @nn.nowrap
    def check_choice(self, option: str, choices: Collection[str]) -> None:
        """Raises ValueError, listing the choices, where the option's value is none of them."""
        if (value := getattr(self, option)) not in choices:
            raise ValueError(
                f"{name_of(self)}: {option} is {value!r}; choose one of {', '.join(sorted(choices))}"
            )

    @nn.nowrap
    def width_per_head(self, heads: int, expand: float = 1.0) -> int:
        """Returns the width of each of the heads that expand * d_model channels are split into.

        Raises ValueError where the heads do not divide them.
        """
        width = int(self.d_model * expand)
        if width % heads:
            what = f"d_model {width}" if expand == 1.0 else f"{expand} * d_model = {width}"
            instead = ", or set head_dim" if hasattr(self, "head_dim") else ""
            raise ValueError(f"{name_of(self)}: num_heads {heads} must divide {what}{instead}")
        return width // heads

    @nn.nowrap
    def conv(self, width: int, **keywords) -> short_conv.ShortConv:
        """Makes a short convolution in the mixer's dtypes."""
        return short_conv.ShortConv(
            width, dtype=self.dtype, param_dtype=self.param_dtype, **keywords
        )

    def conv_tail(self, batch: int, width: int, features: int) -> Array:
        """Returns a convolution's state before the first token."""
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
        """Applies `layers.dense`, called `name`, to x's last axis, in the mixer's dtypes."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return layers.dense(features, name, axes=axes, use_bias=use_bias, **inits, **dtypes)(x)

    def project_heads(self, x: Array, heads: int, dim: int, name: str, **keywords) -> Array:
        """Applies `project` to heads * dim features, split into (B, T, heads, dim)."""
        y = self.project(x, heads * dim, name, **keywords)
        return y.reshape(*y.shape[:-1], heads, dim)

    def merge_heads(self, o_BTHV: Array, name: str = "o", **keywords) -> Array:
        """Applies the output projection from all heads to D."""
        o_BTE = o_BTHV.reshape(*o_BTHV.shape[:2], -1)
        return self.project(o_BTE, self.d_model, name, axes=("heads", "embed"), **keywords)


def name_of(mixer: Mixer) -> str:
    """Returns the mixer's registered name, which is its file's name."""
    return type(mixer).__module__.rpartition(".")[2]


class ChunkedMixer(Mixer):
    """A mixer whose operator works on chunks of time.

    Attributes:
      chunk_size: tokens per chunk, a power of two of at least 16; None leaves it to the operator's
        implementation. It changes speed and rounding, and nothing else.
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
