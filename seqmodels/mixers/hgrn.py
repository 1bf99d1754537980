"""HGRN: a gated linear recurrence whose forget gate has a lower bound that grows with depth."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import layers, norms
from seqmodels.operators import diagonal_scan


@flax.struct.dataclass
class State:
    """Field of HGRN's recurrent state: h_BD of the last token, float32."""

    h_BD: Array


class HGRN(base.Mixer):
    """HGRN (Qin, Yang & Zhong, arXiv 2311.04823, section 3), with a real state.

        h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_i x_t)
        f_t = lb + (1 - lb) sigmoid(W_f x_t)

    y = W_o (RMSNorm(h) * silu(W_g x)), the norm over all D channels. lb is the layer's learned
    lower bound, `base.Layer.lower_bound_D`, and 0 for a mixer that is not in a stack.
    """

    uses_lower_bound = True

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        D = self.d_model
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        bound_D = None if layer is None else layer.lower_bound_D
        if bound_D is None:
            bound_D = jnp.zeros((D,))
        z_BTD = self.project(x_BTD, D, "f").astype(jnp.float32)
        # 1 - f = (1 - lb) sigmoid(-z), without the cancellation.
        write_BTD = (1.0 - bound_D)[None, None] * jax.nn.sigmoid(-z_BTD)
        forget_BTD = bound_D[None, None] + (1.0 - bound_D)[None, None] * jax.nn.sigmoid(z_BTD)
        h_BTD, h_BD = diagonal_scan(
            layers.gated(write_BTD, self.project(x_BTD, D, "i"), nn.silu),
            forget_BTD,
            initial_state=state.h_BD,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        h_BTD = norms.RMSNorm(name="o_norm")(h_BTD).astype(self.dtype)
        h_BTD = layers.gated(h_BTD, self.project(x_BTD, D, "g"), nn.silu)
        y_BTD = self.project(h_BTD, D, "o", axes=("heads", "embed"))
        return y_BTD, State(h_BD)

    def init_state(self, batch):
        return State(jnp.zeros((batch, self.d_model), jnp.float32))
