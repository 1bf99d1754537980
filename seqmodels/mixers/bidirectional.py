"""Any causal mixer in both directions of each document."""

import flax.linen as nn
import jax.numpy as jnp

from seqmodels import mixers
from seqmodels.mixers import wrapper
from seqmodels.modules import grids, orders


class Bidirectional(wrapper.Wrapper):
    """A causal mixer run forward and backward (Vision Mamba, arXiv 2401.09417, section 3.2).

        y = f(x) + R g(R x)

    R turns the tokens of each document round; f and g are the mixer, with parameters of their own
    or the same. A token's own share is in both terms.

    Attributes:
      mixer: the causal mixer and its options, as in a pattern: "mamba2" or "gla(num_heads=2)".
      shared: whether f and g have the same parameters.
      combine: "sum", or "mean", which is half of it.
    """

    shared: bool = False
    combine: str = "sum"

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        self.check_choice("combine", ("mean", "sum"))
        grids.check_grid("bidirectional", self.grid, x_BTD.shape[1], segment_ids_BT)
        if not mixers.mixer_class(self.spec().name).causal:
            raise ValueError(
                f"bidirectional: mixer is {self.mixer!r}, which sees whole documents already; "
                "take a causal one, as in ordered(mixer=\"bidirectional(mixer='mamba2')\"); causal "
                f"are {', '.join(mixers.causal_names())}"
            )
        forward = self.make_wrapped(name="forward")
        backward = forward if self.shared else self.make_wrapped(name="backward")
        index_BT = None if segment_ids_BT is None else orders.reversal(segment_ids_BT)

        def reverse(x_BTD):
            if index_BT is None:
                return jnp.flip(x_BTD, axis=1)
            return orders.permute(x_BTD, index_BT, index_BT)

        # Documents keep their places in the row, so the ids are those of the reversed tokens too.
        ahead_BTD, _ = forward(x_BTD, segment_ids_BT, layer=layer)
        behind_BTD, _ = backward(reverse(x_BTD), segment_ids_BT, layer=layer)
        y_BTD = ahead_BTD + reverse(behind_BTD)
        return (y_BTD if self.combine == "sum" else 0.5 * y_BTD), None
