"""TransNormerLLM: linear attention with fixed decays that weaken with depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.mixers.transnormer import LRPE
from seqmodels.modules import norms, positions
from seqmodels.operators import linear_attention


class TransNormerLLM(base.ChunkedMixer):
    """TransNormerLLM's lightning attention (Qin et al., arXiv 2307.14995, eqs. 3 and 7-9).

        S_t = lambda_h S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t
        y_t = W_o (Norm(o_t) * u_t)

    q, k = silu(W x), v = W_v x, u = W_u x. The norm, by default SRMSNorm, is over all heads
    together. There is no factor 1/sqrt(K). lambda_h = exp(-slope_h) is a constant whose slope falls
    from layer to layer; a mixer that is not in a stack has the first layer's slopes.

    Attributes:
      num_heads: H.
      head_dim: K = V; None is D / H.
      slopes: rule of `decay_slopes`: "arithmetic" is the paper's, "alibi" that of its released
        code, and "minimax" MiniMax's.
      lrpe: whether `transnormer.LRPE` encodes relative positions in q and k, which doubles K in the
        state. The paper's stack does so in its first layer only:
        "transnormer_llm(lrpe=True) + 11*transnormer_llm".
      value_activation, gate_activation: activations of v and u: "identity", "silu" or "sigmoid".
        MiniMax-Text-01 (arXiv 2501.08313) takes "silu" and "sigmoid", with norm "rms_norm" and
        "alibi" or "minimax" slopes.
      norm, norm_eps: a name of `norms.NORMS`, and that norm's epsilon.
    """

    num_heads: int = 4
    head_dim: int | None = None
    slopes: str = "arithmetic"
    lrpe: bool = False
    value_activation: str = "identity"
    gate_activation: str = "identity"
    norm: str = "srms_norm"
    norm_eps: float = 1e-6

    def _sizes(self) -> tuple[int, int]:
        self.check_choice("slopes", SLOPES)
        self.check_choice("value_activation", ACTIVATIONS)
        self.check_choice("gate_activation", ACTIVATIONS)
        self.check_choice("norm", norms.NORMS)
        return self.num_heads, self.head_dim or self.width_per_head(self.num_heads)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q_BTHK, k_BTHK, v_BTHK = (self.project_heads(x_BTD, H, K, name) for name in "qkv")
        q_BTHK, k_BTHK = nn.silu(q_BTHK), nn.silu(k_BTHK)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        if self.lrpe:
            rotate = LRPE(name="lrpe")
            q_BTHK, k_BTHK = rotate(q_BTHK, position_BT), rotate(k_BTHK, position_BT)
        layer = layer or base.Layer(0, 1)
        o_BTHK, S_BHKV = linear_attention(
            q_BTHK,
            k_BTHK,
            ACTIVATIONS[self.value_activation](v_BTHK),
            -decay_slopes(self.slopes, H, layer.index, layer.count),
            scale=1.0,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        norm = norms.NORMS[self.norm](eps=self.norm_eps, name="o_norm")
        u_BTE = ACTIVATIONS[self.gate_activation](self.project(x_BTD, H * K, "u"))
        y_BTD = self.merge_heads(norm(o_BTHK.reshape(u_BTE.shape)) * u_BTE)
        return y_BTD, base.PositionedState(S_BHKV, position_BT[:, -1] + 1)

    def init_state(self, batch):
        H, K = self._sizes()
        return base.PositionedState.empty(batch, H, 2 * K if self.lrpe else K, K)


ACTIVATIONS = {"identity": jax.nn.identity, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def _alibi(heads: int) -> list[float]:
    """Returns ALiBi's slopes (arXiv 2108.12409, section 3), 2^(-8 (h+1) / H) for H a power of two.

    Another number of heads has the slopes of the next smaller power of two, and then every second
    slope of the next larger one.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + _alibi(2 * power)[::2][: heads - power]


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]


def _arithmetic(heads: int) -> list[float]:
    return [8.0 * h / heads for h in range(heads)]


# name: (slopes of the first layer, how they weaken with depth)
SLOPES = {
    "alibi": (_alibi, lambda index, count: 1.0 - index / max(count - 1, 1) + 1e-5),
    "arithmetic": (_arithmetic, lambda index, count: 1.0 - index / count),
    "minimax": (_geometric, lambda index, count: 1.0 - index / (count - 1 + 1e-5) + 1e-5),
}


def decay_slopes(rule: str, heads: int, index: int | Array, count: int) -> Array:
    """Returns the decay slopes (H,) of layer l = `index`, from 0, of a stack of L = `count` layers.

    Head h decays by exp(-slope_h) per token. Rules:

    arithmetic   8 h/H (1 - l/L), TransNormerLLM's paper; head 0 never forgets
    alibi        2^(-8 (h+1)/H) (1 - l/(L-1) + 1e-5), TransNormerLLM's released code, with ALiBi's
                 slopes where H is no power of two; the last layer hardly forgets
    minimax      2^(-8 (h+1)/H) (1 - l/(L-1 + 1e-5) + 1e-5), MiniMax in transformers, for any H
    """
    slopes, depth = SLOPES[rule]
    return jnp.asarray(slopes(heads), jnp.float32) * depth(index, count)
