"""LAWCAT: a softmax layer's projections, short convolutions, and normalised gated attention."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import attention
from seqmodels.modules import feature_maps, positions, short_conv


@flax.struct.dataclass
class State:
    """Fields of LAWCAT's state.

    Attributes:
      S_BHFV: the recurrence's matrix, whose last column sums the weights.
      q_tail, k_tail: the last inputs of the convolutions on q and k; None without convolutions.
      next_position_B: position of the next token in its document.
    """

    S_BHFV: Array
    q_tail: Array | None
    k_tail: Array | None
    next_position_B: Array


class LAWCAT(attention.LinearizedAttention):
    """LAWCAT (arXiv 2509.18467), on a softmax layer's projections.

        S_t = diag(a_t) S_{t-1} + phi(k_t) [v_t, 1]^T
        [n_t, d_t] = S_t^T phi(q_t)
        o_t = n_t / (d_t + eps)

    The paper's code is not public, so the normaliser's form and the gate are inferred. q, k, v, W_o
    and their options are those of `attention.Attention`. q and k pass causal depthwise convolutions
    that start as the identity, are rotated, and go through the learned map phi. log a =
    logsigmoid(W_up W_down x + b) / gate_temperature, per feature of each head; W_up starts at 0 and
    b at gate_bias, so that at first all features decay equally and slowly.

    Attributes:
      conv_width: taps; None: no convolutions.
      feature_map, features: `feature_maps`, never negative.
      gate_rank: of W_down; None: a = 1.
      eps: added to the sum of weights.
    """

    window: int | None = None  # refused where it is set
    conv_width: int | None = 4
    feature_map: str = "hedgehog_softmax"
    features: int | None = 32
    gate_rank: int | None = 16
    gate_temperature: float = 16.0
    gate_bias: float = 4.0
    eps: float = 1e-12

    def _sizes(self):
        if self.window is not None:
            raise ValueError(f"lawcat: it has no window; got window={self.window}")
        self._check_nonnegative(self.feature_map)
        return super()._sizes()

    def _features(self) -> int:
        return feature_maps.output_dim(self.feature_map, self._sizes()[2], self.features)

    def _convolved(self, name, x_BTHK, segment_ids_BT, tail):
        if self.conv_width is None:
            return x_BTHK, tail
        x_BTE = x_BTHK.reshape(*x_BTHK.shape[:2], -1)
        start = {"activation": None, "kernel_init": short_conv.identity_taps}
        conv = self.conv(self.conv_width, **start, name=f"{name}_conv")
        y_BTE, tail = conv(x_BTE, segment_ids_BT, tail)
        return y_BTE.reshape(x_BTHK.shape), tail

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H = self._sizes()[0]
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q_BTHK, k_BTGK, v_BTGV = self._queries_keys_values(x_BTD)
        q_BTHK, q_tail = self._convolved("q", q_BTHK, segment_ids_BT, state.q_tail)
        k_BTGK, k_tail = self._convolved("k", k_BTGK, segment_ids_BT, state.k_tail)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        q_BTHK, k_BTGK = (self._rotate(x, position_BT) for x in (q_BTHK, k_BTGK))

        def mapped(name, x_BTHK):
            phi = feature_maps.FeatureMap(self.feature_map, self.features, name=f"{name}_map")
            return phi(x_BTHK)

        log_decay_BTHF = None
        if self.gate_rank is not None:
            low_rank = self.project(x_BTD, self.gate_rank, "gk_down", axes=("embed", None))
            gate_BTHF = self.project_heads(
                low_rank, H, self._features(), "gk_up", axes=(None, "heads"), use_bias=True,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.gate_bias),
            )  # fmt: skip
            log_decay_BTHF = jax.nn.log_sigmoid(gate_BTHF.astype(jnp.float32))
            log_decay_BTHF = log_decay_BTHF / self.gate_temperature
        # A column of ones beside v sums the weights in the same pass.
        v_BTHV = self._of_all_heads(v_BTGV)
        sums_BTHV, S_BHFV = operators.linear_attention(
            mapped("q", q_BTHK),
            mapped("k", self._of_all_heads(k_BTGK)),
            jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1),
            log_decay_BTHF,
            scale=1.0,
            **self.recurrence_keywords(state.S_BHFV, segment_ids_BT),
        )
        sums_BTHV = sums_BTHV.astype(jnp.float32)
        o_BTHV = (sums_BTHV[..., :-1] / (sums_BTHV[..., -1:] + self.eps)).astype(self.dtype)
        return self._output(x_BTD, o_BTHV), State(S_BHFV, q_tail, k_tail, position_BT[:, -1] + 1)

    def init_state(self, batch):
        H, G, K = self._sizes()
        q_tail = k_tail = None
        if self.conv_width is not None:
            q_tail, k_tail = (self.conv_tail(batch, self.conv_width, n * K) for n in (H, G))
        S_BHFV = jnp.zeros((batch, H, self._features(), K + 1), jnp.float32)
        return State(S_BHFV, q_tail, k_tail, jnp.zeros((batch,), jnp.int32))
