"""MLP-Mixer's token mixing: an MLP along time, the same for every channel."""

import flax.linen as nn

from seqmodels.mixers import base
from seqmodels.modules import padded_documents, token_mlp


class MLPMixer(base.WholeDocumentMixer):
    """MLP-Mixer's token mixing (Tolstikhin et al., arXiv 2105.01601, eq. 1).

        y_td = b'_t + sum_f V_tf gelu(b_f + sum_s W_fs x_sd)

    W and V have one weight per position in the document, t and s, and hidden unit f; all channels d
    share them. A shorter document is one that is padded with zeros. Packed rows are exact, and cost
    as many calls as the row with the most documents has.

    A block of this mixer with `channel_mixer="gelu"`, `norm="layer_norm"` and biases is the
    published one; `from_vit_jax` names its weights as this house does.

    Attributes:
      max_length: M, the most tokens of a document; later ones are not seen and give 0. Where a grid
        is given, M is its number of tokens.
      hidden: number of hidden units; None is D / 2, as in the published models.
    """

    max_length: int = 64
    hidden: int | None = None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        M, place_BT = self._places(x_BTD, segment_ids_BT, layer)
        weights = self._token_mlp(M)

        def mix(x_BMD, seen_BM, run):
            return token_mlp.mixed(weights, x_BMD), ()

        x_BTD = x_BTD.astype(self.dtype)
        y_BTD, _ = padded_documents.each_document(
            mix, x_BTD, segment_ids_BT, M, position_BT=place_BT
        )
        return y_BTD, None

    @nn.nowrap
    def _places(self, x_BTD, segment_ids_BT, layer):
        """Returns M and each token's place in its document."""
        name = base.name_of(self)
        padded_documents.check_options(name, self.implementation, max_length=self.max_length)
        return padded_documents.places(
            name, x_BTD, segment_ids_BT, self.grid, self.max_length, layer
        )

    def _token_mlp(self, positions: int, experts: int | None = None):
        """Makes the weights of an MLP over a document's positions, or of several."""
        return token_mlp.TokenMLP(
            positions,
            self.hidden or max(self.d_model // 2, 1),
            experts=experts,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="token_mixing",
        )()


def from_vit_jax(block: dict) -> dict:
    """Renames the weights of a MixerBlock of vision_transformer's vit_jax to those of a Block.

    block: the tree under `MixerBlock_<i>`. Its `token_mixing/Dense_0` and `Dense_1` are
      `mixer/token_mixing/up` and `down`, `channel_mixing/Dense_0` and `Dense_1` are
      `channel_mixer/up` and `down`, `LayerNorm_0` and `LayerNorm_1` are `mixer_norm/norm` and
      `channel_norm/norm`; no array changes its shape.
    """

    def mlp(dense):
        return {"up": dense["Dense_0"], "down": dense["Dense_1"]}

    return {
        "mixer_norm": {"norm": block["LayerNorm_0"]},
        "mixer": {"token_mixing": mlp(block["token_mixing"])},
        "channel_norm": {"norm": block["LayerNorm_1"]},
        "channel_mixer": mlp(block["channel_mixing"]),
    }
