"""A shallow feed-forward network over the whole sentence, in place of attention."""

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.mixers import base
from seqmodels.modules import padded_documents, sentence_ffn


class ShallowFFN(base.WholeDocumentMixer):
    """A feed-forward network over the sentence (Bozic et al., arXiv 2311.10642, section 3).

        vec(y) = Lin Norm(LeakyReLU(Lin Norm(vec(x))))

    vec(x) are the W = M D numbers of the sentence, padded with zeros to M tokens; the hidden layer
    has W / s units. The paper trains it to give what a trained transformer's attention gives, by
    `linearize`'s attention transfer. Its levels of replacement, from attention alone to the layer:

        ALR   attention                          shallow_ffn
        ALSR  each head; W_o after them          shallow_ffn(num_heads=8)
        ALRR  attention, residual connection     shallow_ffn(mixer_residual=(0.0, 1.0))
        ELR   the whole layer                    shallow_ffn(mixer_residual=(0.0, 1.0),
                                                             channel_mixer=None)

    Packed rows are exact, and cost as many calls as the row with the most documents has.

    Attributes:
      max_length: M; later tokens are not seen and give 0. Where a grid is given, M is its number of
        tokens. The paper has 50.
      size: s by name: "xs" 256, "s" 128, "m" 8, "l" 2, "xl" 1/2 (twice as wide as the sentence).
      num_heads: H networks over the whole sentence, each with M D / H outputs and an equal share of
        the W / s hidden units, and a projection W_o of them all (ALSR); None is one network (ALR).
    """

    max_length: int = 50
    size: str = "l"
    num_heads: int | None = None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        M, place_BT = padded_documents.places(
            base.name_of(self), x_BTD, segment_ids_BT, self.grid, self.max_length, layer
        )
        network, H, K = make_network(self, M, M)

        def mix(x_BMD, seen_BM, run):
            y_BHMK = network(x_BMD.reshape(x_BMD.shape[0], -1)).reshape(-1, H, M, K)
            return jnp.swapaxes(y_BHMK, 1, 2).reshape(-1, M, H * K), ()

        x_BTD = x_BTD.astype(self.dtype)
        y_BTD, _ = padded_documents.each_document(
            mix, x_BTD, segment_ids_BT, M, position_BT=place_BT
        )
        return (y_BTD if self.num_heads is None else self.merge_heads(y_BTD[..., None])), None


def make_network(mixer, tokens: int, tokens_out: int):
    """Makes the network that a mixer's `size` and `num_heads` describe; returns it, H and K.

    tokens, tokens_out: number of tokens that it reads, and that it gives for K channels per head.
    """
    H, name = mixer.num_heads or 1, base.name_of(mixer)
    padded_documents.check_options(name, mixer.implementation, max_length=tokens, num_heads=H)
    K, W = mixer.width_per_head(H), tokens * mixer.d_model
    hidden = sentence_ffn.hidden_units(name, mixer.size, W)
    network = sentence_ffn.SentenceFFN(
        W,
        max(hidden // H, 1),
        tokens_out * K,
        H,
        dtype=mixer.dtype,
        param_dtype=mixer.param_dtype,
        name="network",
    )()
    return network, H, K
