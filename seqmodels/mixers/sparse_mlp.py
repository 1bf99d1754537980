"""Sparse-MLP's token mixing: a mixture of MLPs along time, to which channels are routed."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base, mlp_mixer
from seqmodels.modules import channel_routing, layers, padded_documents, token_mlp


class SparseMLP(mlp_mixer.MLPMixer):
    """Sparse-MLP's token mixing, MoE_s (Lou et al., arXiv 2109.02008, section 3).

        y_d = sum_{e = argmax p_d} p_de MLP_e(x_d)
        p_d = softmax(W_g x_d + eps), x_d the whole document in channel d

    MLP_e is an MLP-Mixer's MLP along time. Re-represent layers before MoE_s, linear maps from T to
    2T tokens and from D to D/2 channels, and the same back after it, make the rows that are routed
    longer and fewer. eps ~ N(0, 1/X^2) is drawn where the caller gives a random stream "noise". The
    loss that balances X experts, `loss_weight` (CV^2(importance) + CV^2(load)) / 2 over the batch
    (`channel_routing.choose`), is sown as "balance" into the collection "losses".

    Sparse-MLP's other mixture, MoE_c, is the option
    `channel_mixer="moe(num_experts=8, experts_per_token=2)"`. The paper has sparse blocks last:
    "10*mlp_mixer + 2*sparse_mlp(...)". No code was published: this follows the text.

    Attributes:
      num_experts: X. One expert without `re_represent` is `mlp_mixer` exactly.
      re_represent: whether there are re-represent layers; D must be even.
      capacity_factor: c, where each expert serves at most c R / X of a document's R rows, those
        with the largest p first; the others give 0. None is no limit.
      loss_weight: factor of the balance loss.
    """

    num_experts: int = 8
    re_represent: bool = True
    capacity_factor: float | None = None
    loss_weight: float = 0.01

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        M, place_BT = self._places(x_BTD, segment_ids_BT, layer)
        D, X, name = self.d_model, self.num_experts, base.name_of(self)
        padded_documents.check_options(name, None, num_experts=X)
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"{name}: capacity_factor is {self.capacity_factor}; it must be more than 0, or None"
            )
        if self.re_represent and D % 2:
            raise ValueError(f"{name}: re_represent halves the channels, and d_model is {D}")
        N = 2 * M if self.re_represent else M
        weights = self._token_mlp(N, X)
        router_NX = layers.Matrix(X, (None, None), jnp.float32, name="router")(N)
        before = self._re_representation("before", (M, 2 * M), (D, D // 2))
        after = self._re_representation("after", (2 * M, M), (D // 2, D))
        noise_key = self.make_rng("noise") if self.has_rng("noise") else None

        def mix(x_BMD, seen_BM, run):
            # A row is one channel of the whole document, over N positions.
            x_BEN = jnp.swapaxes(before(x_BMD), 1, 2)
            logits_BEX = jnp.einsum("BEN,NX->BEX", x_BEN.astype(jnp.float32), router_NX)
            real_B = is_real(segment_ids_BT, seen_BM, run)
            choice = channel_routing.choose(
                logits_BEX,
                jnp.broadcast_to(real_B[:, None], x_BEN.shape[:2]),
                None if noise_key is None else jax.random.fold_in(noise_key, run),
            )
            choice = channel_routing.within_capacity(choice, X, self.capacity_factor)
            y_BEN = token_mlp.chosen(weights, x_BEN, choice.expert)
            y_BEN *= choice.weight[..., None].astype(y_BEN.dtype)
            return after(jnp.swapaxes(y_BEN, 1, 2)), choice.sums

        x_BTD = x_BTD.astype(self.dtype)
        y_BTD, sums = padded_documents.each_document(
            mix, x_BTD, segment_ids_BT, M, position_BT=place_BT
        )
        self.sow("losses", "balance", self.loss_weight * channel_routing.balance_loss(sums))
        return y_BTD, None

    def _re_representation(self, name: str, tokens: tuple[int, int], channels: tuple[int, int]):
        """Makes the weights of a linear map of tokens and one of channels; returns both in turn."""
        if not self.re_represent:
            return lambda x_BMD: x_BMD
        maps = {"tokens": (tokens, (None, None)), "channels": (channels, ("embed", None))}
        tokens_MN, channels_DE = (
            layers.Matrix(size[1], axes, self.param_dtype, name=f"{name}_{which}")(size[0])
            for which, (size, axes) in maps.items()
        )
        tokens_MN, channels_DE = (w.astype(self.dtype) for w in (tokens_MN, channels_DE))
        return lambda x_BMD: jnp.einsum("BMD,MN,DE->BNE", x_BMD, tokens_MN, channels_DE)


def is_real(segment_ids_BT: Array | None, seen_BM: Array, run: Array | int) -> Array:
    """Returns which rows' document number `run` has tokens and is not padding, booleans (B,)."""
    if segment_ids_BT is None:
        return jnp.any(seen_BM, axis=1)
    return jnp.any((operators.run_index(segment_ids_BT) == run) & (segment_ids_BT != 0), axis=1)
