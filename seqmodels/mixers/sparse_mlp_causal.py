"""A causal Sparse-MLP, for language models: channels are routed anew at every token."""

import jax
import jax.numpy as jnp

from seqmodels.mixers import base, mlp_mixer_causal, sparse_mlp
from seqmodels.modules import channel_routing, layers, padded_documents, token_mlp


class CausalSparseMLP(mlp_mixer_causal.CausalMLPMixer):
    """Sparse-MLP's MoE_s (arXiv 2109.02008, section 3) with masked weights; the mask is ours.

        y_td = sum_{e = argmax p_td} p_tde MLP_e(x_d)_t
        p_td = softmax(sum_{s<=t} W_gs x_sd + eps)

    MLP_e is the causal MLP of `mlp_mixer_causal`. A channel d has a choice of its own at every
    token t, made from the document so far. All experts are computed. There are no re-represent
    layers and no capacity, which see whole documents. eps and the balance loss are those of
    `sparse_mlp`.

    Attributes:
      num_experts: X. One expert is `mlp_mixer_causal` exactly.
      loss_weight: factor of the balance loss.
    """

    num_experts: int = 4
    loss_weight: float = 0.01

    def _function(self, segment_ids_BT):
        M, X = self.max_length, self.num_experts
        padded_documents.check_options(base.name_of(self), None, num_experts=X)
        weights = token_mlp.TokenMLP(
            M,
            self.expand * M,
            experts=X,
            causal=True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="token_mixing",
        )()
        router_MX = layers.Matrix(X, (None, None), jnp.float32, name="router")(M)
        noise_key = self.make_rng("noise") if self.has_rng("noise") else None

        def mix(x_BMD, seen_BM, run):
            x_BMD1 = x_BMD.astype(jnp.float32)[..., None]
            logits_BMDX = jnp.cumsum(x_BMD1 * router_MX[None, :, None], axis=1)
            real_B = sparse_mlp.is_real(segment_ids_BT, seen_BM, run)
            choice = channel_routing.choose(
                logits_BMDX,
                jnp.broadcast_to((seen_BM & real_B[:, None])[..., None], x_BMD.shape),
                None if noise_key is None else jax.random.fold_in(noise_key, run),
            )
            y_XBMD = jax.vmap(token_mlp.mixed, in_axes=(0, None))(weights, x_BMD)
            chosen_BMDX = jax.nn.one_hot(choice.expert, X) * choice.weight[..., None]
            return jnp.einsum("BMDX,XBMD->BMD", chosen_BMDX.astype(self.dtype), y_XBMD), choice.sums

        return mix

    def _report(self, sums):
        self.sow("losses", "balance", self.loss_weight * channel_routing.balance_loss(sums))
