"""A layer that chooses between softmax and linear attention while it is trained."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels.mixers import attention, lolcats
from seqmodels.modules import layers, positions


@flax.struct.dataclass
class State:
    """Fields of a selective layer's state: the states of its softmax and of its linear part."""

    softmax: attention.KeyValueCache
    linear: lolcats.State


class Selective(lolcats.LoLCATs):
    """A layer that chooses softmax or linear attention (LinVideo, arXiv 2510.08318, eq. 3).

        o = r o_softmax + (1 - r) o_linear
        r = sigmoid(mix_logit), one number per layer

    Both parts share a softmax layer's projections; o_linear is LoLCATs' linear attention without a
    window. In training `linearize.objectives.selection_penalty` drives each layer's r to 0 or 1,
    and a given number of layers to 1; then `linearize.students.chosen` replaces each layer by the
    part that it chose. Where r rounds to 1 the layer is exactly softmax attention.

    Attributes:
      window: must be None.
      mix_init: the value at which r starts, between 0 and 1.
    """

    window: int | None = None  # refused where it is set
    mix_init: float = 0.9

    def _sizes(self):
        if self.window is not None:
            raise ValueError(f"selective: its softmax part is full; got window={self.window}")
        if not 0 < self.mix_init < 1:
            raise ValueError(f"selective: mix_init must lie between 0 and 1; got {self.mix_init}")
        return super()._sizes()

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        B, T, _ = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGV = self._queries_keys_values(x_BTD)
        cache = None if state is None else state.softmax
        sums = super().init_state(B) if state is None else state.linear
        position_BT = positions.token_positions(B, T, segment_ids_BT, sums.next_position_B)
        q_BTHK, k_BTGK = (self._rotate(x, position_BT) for x in (q_BTHK, k_BTGK))
        new = (q_BTHK, k_BTGK, v_BTGV, position_BT, segment_ids_BT)
        softmax_BTHV, cache = self._attend(*new, cache)
        linear_BTHV, sums = self._mixed(*new, sums)
        odds = self.mix_init / (1.0 - self.mix_init)
        init = nn.initializers.constant(jnp.log(odds))
        r = jax.nn.sigmoid(layers.gate_parameter(self, "mix_logit", init, (1,)))
        r = r[:, None, None, None].astype(self.dtype)
        return self._output(x_BTD, r * softmax_BTHV + (1.0 - r) * linear_BTHV), State(cache, sums)

    def init_state(self, batch):
        return State(attention.Attention.init_state(self, batch), super().init_state(batch))
