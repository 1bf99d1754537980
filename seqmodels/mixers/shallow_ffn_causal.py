"""A shallow feed-forward network over the sentence so far, in place of causal attention."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.mixers.shallow_ffn import make_network
from seqmodels.modules import padded_documents, positions


@flax.struct.dataclass
class State:
    """Fields of the network's state: what it reads again.

    Attributes:
      x_BMD: the last M - 1 inputs, oldest first.
      next_position_B: position of the next token in its document.
    """

    x_BMD: Array
    next_position_B: Array


class CausalShallowFFN(base.Mixer):
    """A feed-forward network over the prefix (Bozic et al., arXiv 2311.10642, section 3, decoder).

        y_t = Lin Norm(LeakyReLU(Lin Norm(vec(x_0, ..., x_t, 0, ..., 0))))

    The prefix is padded with zeros to M tokens, and the network gives the D numbers of its last
    token. From the M-th token on it reads the last M tokens, which is ours: the paper's sentences
    are not longer than M. It runs once per token, over W = M D numbers, of which T rows are made:
    T M D numbers in memory. With M = 1 it is an MLP.

    Attributes:
      max_length: M; the paper has 50.
      size: the number of hidden units, W / s, as in `shallow_ffn`.
      num_heads: H networks over the whole prefix, as in `shallow_ffn`; None is one.
    """

    max_length: int = 50
    size: str = "l"
    num_heads: int | None = None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        (B, T, _), M = x_BTD.shape, self.max_length
        if state is None:
            state = self.init_state(B)
        network, H, K = make_network(self, M, 1)
        x_BTD = x_BTD.astype(self.dtype)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        arrays = {
            "old_BSD": (state.x_BMD, "BSM"),
            "x_BTD": (x_BTD, "BTM"),
            "position_BT": (position_BT, "BT"),
        }
        prefix_BTMD = operators.on_parts(self._prefixes, arrays, "BTXM")
        y_NHK = network(prefix_BTMD.reshape(B * T, -1))
        y_BTHK = y_NHK.reshape(B, T, H, K)
        x_BMD = jnp.concatenate([state.x_BMD, x_BTD], axis=1)[:, T:]
        y_BTD = y_BTHK.reshape(B, T, H * K) if self.num_heads is None else self.merge_heads(y_BTHK)
        return y_BTD, State(x_BMD, position_BT[:, -1] + 1)

    @nn.nowrap
    def _prefixes(self, axis_name, old_BSD, x_BTD, position_BT):
        """Returns what the network reads for each token of this shard, (B, T, M, D)."""
        M, T = self.max_length, x_BTD.shape[1]
        x_BSD = operators.with_earlier(axis_name, old_BSD, x_BTD)
        # Token t's prefix starts min(t's position, M - 1) tokens before it, at its slot M - 1 + t.
        length_BT = jnp.minimum(position_BT, M - 1)
        slot_M = jnp.arange(M, dtype=jnp.int32)
        first_BT = jnp.arange(M - 1, M - 1 + T, dtype=jnp.int32)[None] - length_BT
        index_BTM = jnp.minimum(first_BT[..., None] + slot_M[None, None], M + T - 2)
        prefix_BTMD = jnp.take_along_axis(x_BSD[:, None], index_BTM[..., None], axis=2)
        seen_BTM = slot_M[None, None] <= length_BT[..., None]
        return jnp.where(seen_BTM[..., None], prefix_BTMD, 0)

    def init_state(self, batch):
        padded_documents.check_options(
            base.name_of(self), self.implementation, max_length=self.max_length
        )
        x_BMD = jnp.zeros((batch, self.max_length - 1, self.d_model), self.dtype)
        return State(x_BMD, jnp.zeros((batch,), jnp.int32))
