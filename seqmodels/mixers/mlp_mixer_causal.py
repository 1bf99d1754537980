"""A causal MLP-Mixer, for language models: token mixing with masked weights."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import padded_documents, positions, token_mlp


@flax.struct.dataclass
class State:
    """Fields of a causal token mixing's state: the document's inputs so far.

    Attributes:
      x_BMD: the input at each of the M positions, 0 at those to come.
      next_position_B: position of the next token in its document.
    """

    x_BMD: Array
    next_position_B: Array


class CausalMLPMixer(base.Mixer):
    """Token mixing of MLP-Mixer (arXiv 2105.01601, eq. 1) with masked weights; the mask is ours.

        y_td = b'_t + sum_{f: p(f) <= t} V_tf gelu(h_fd)
        h_fd = b_f + sum_{s <= p(f)} W_fs x_sd

    W and V have one weight per position in the document, t and s, and hidden unit f; all channels d
    share them. Unit f belongs to position p(f) = f // expand. Every call, one token in decoding
    too, costs as much as a document of M tokens.

    Attributes:
      max_length: M, the most tokens of a row; when decoding, later ones are not seen and give 0.
      expand: number of hidden units per position.
    """

    max_length: int = 64
    expand: int = 1

    bounded = True

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        M = self.max_length
        padded_documents.check_length(base.name_of(self), T, M)
        x_BTD = x_BTD.astype(self.dtype)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        y_BTD, sums = padded_documents.each_document(
            self._function(segment_ids_BT),
            x_BTD,
            segment_ids_BT,
            M,
            position_BT=position_BT,
            first_BMD=state.x_BMD,
        )
        self._report(sums)
        # The inputs of each row's last document: with those of the state where it is the first.
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros((B, T), jnp.int32)
        run_BT = operators.run_index(segment_ids_BT)
        slot_BT = jnp.where(run_BT == run_BT[:, -1:], position_BT, M)
        x_BMD, _ = padded_documents.slots(x_BTD, slot_BT, M)
        x_BMD += jnp.where((run_BT[:, -1] == 0)[:, None, None], state.x_BMD, 0)
        return y_BTD, State(x_BMD, position_BT[:, -1] + 1)

    def _function(self, segment_ids_BT) -> padded_documents.Function:
        """Makes the parameters; returns the function of a padded document."""
        weights = token_mlp.TokenMLP(
            self.max_length,
            self.expand * self.max_length,
            causal=True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="token_mixing",
        )()
        return lambda x_BMD, seen_BM, run: (token_mlp.mixed(weights, x_BMD), ())

    def _report(self, sums) -> None:
        """Sows what the documents' sums say; here they are empty."""

    def init_state(self, batch):
        padded_documents.check_options(
            base.name_of(self), self.implementation, max_length=self.max_length, expand=self.expand
        )
        x_BMD = jnp.zeros((batch, self.max_length, self.d_model), self.dtype)
        return State(x_BMD, jnp.zeros((batch,), jnp.int32))
