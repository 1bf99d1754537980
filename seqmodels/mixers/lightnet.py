"""LightNet: linear attention whose keys are a running softmax over time."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import documents, layers, norms


@flax.struct.dataclass
class State:
    """Fields of LightNet's state: S_BHKV, and z_BHK = log sum_s exp(k_s), -inf before any token."""

    S_BHKV: Array
    z_BHK: Array


class LightNet(base.ChunkedMixer):
    """LightNet, causal (Qin et al., arXiv 2405.21022, and flash-linear-attention's layer).

        S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T
        o_t = S_t^T q_t
        z_t = log sum_{s<=t} exp(k_s)

    q = silu(W_q x), k = W_k x, v = W_v x; y = W_o (RMSNorm(o) * silu(W_up W_down x)), the norm over
    all heads together. Row i of S_t is the mean of the values so far under a softmax over time of
    key channel i, so the decay goes to 1 as time goes on. `lightnet_nd` sees whole documents.

    Attributes:
      num_heads: H; K = V = D / H.
      gate_rank: width of W_down x.
      norm_eps: epsilon of the RMSNorm.
    """

    num_heads: int = 4
    gate_rank: int = 128
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        q_BTHK, k_BTHK, v_BTHV = projections(self, x_BTD)
        weight_BTHK, log_decay_BTHK, z_BHK = running_softmax(k_BTHK, state.z_BHK, segment_ids_BT)
        o_BTHV, S_BHKV = operators.linear_attention(
            q_BTHK,
            weight_BTHK.astype(self.dtype),
            v_BTHV,
            log_decay_BTHK,
            scale=1.0,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        return gated_output(self, o_BTHV, x_BTD), State(S_BHKV, z_BHK)

    def init_state(self, batch):
        H, K = self.num_heads, self.width_per_head(self.num_heads)
        z_BHK = jnp.full((batch, H, K), -jnp.inf, jnp.float32)
        return State(jnp.zeros((batch, H, K, K), jnp.float32), z_BHK)


def projections(mixer: base.Mixer, x_BTD: Array) -> tuple[Array, Array, Array]:
    """Returns q = silu(W_q x), k = W_k x and v = W_v x of LightNet's heads."""
    H, K = mixer.num_heads, mixer.width_per_head(mixer.num_heads)
    q_BTHK, k_BTHK, v_BTHV = (mixer.project_heads(x_BTD, H, K, name) for name in "qkv")
    return nn.silu(q_BTHK), k_BTHK, v_BTHV


def gated_output(mixer: base.Mixer, o_BTHV: Array, x_BTD: Array) -> Array:
    """Returns y = W_o (RMSNorm(o) * silu(W_up W_down x)), the norm over all heads together."""
    low_rank = mixer.project(x_BTD, mixer.gate_rank, "g_down", axes=("embed", None))
    gate_BTD = mixer.project(low_rank, mixer.d_model, "g_up", axes=(None, "heads"))
    o_BTD = norms.RMSNorm(mixer.norm_eps, name="o_norm")(o_BTHV.reshape(x_BTD.shape))
    return mixer.merge_heads(layers.gated(o_BTD, gate_BTD, nn.silu)[..., None])


def running_softmax(
    k_BTHK: Array, z_BHK: Array, segment_ids_BT: Array | None
) -> tuple[Array, Array, Array]:
    """Returns exp(k_t - z_t), log(1 - exp(k_t - z_t)) and the last token's z, in float32 or wider.

    z_t = log sum_{s<=t} exp(k_s) over the tokens of t's document. As exp(z_{t-1}) + exp(k_t) =
    exp(z_t), the first is sigmoid(k_t - z_{t-1}), and the second, z_{t-1} - z_t, is the log of one
    minus it: never above 0, whatever z is rounded to, and -inf at a document's first token.

    z_BHK: z before the row's first token, of its document.
    """
    k_BTHK = k_BTHK.astype(jnp.promote_types(k_BTHK.dtype, jnp.float32))
    z_BTHK = documents.running(jnp.logaddexp, k_BTHK, segment_ids_BT)
    z_BHK = z_BHK.astype(k_BTHK.dtype)
    first_BT = jnp.ones(k_BTHK.shape[:2], bool)
    if segment_ids_BT is not None:
        first_BT = operators.run_index(segment_ids_BT) == 0
    entering_BTHK = jnp.where(first_BT[..., None, None], z_BHK[:, None], -jnp.inf)
    z_BTHK = jnp.logaddexp(z_BTHK, entering_BTHK)
    previous_BTHK = operators.previous(z_BTHK, z_BHK, "BTHK")
    if segment_ids_BT is not None:
        start_BT = operators.starts(segment_ids_BT)
        previous_BTHK = jnp.where(start_BT[..., None, None], -jnp.inf, previous_BTHK)
    logit_BTHK = k_BTHK - previous_BTHK
    return jax.nn.sigmoid(logit_BTHK), jax.nn.log_sigmoid(-logit_BTHK), z_BTHK[:, -1]
