"""Liger: gated linear attention on a softmax layer's projections, plus softmax in a window."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import attention
from seqmodels.modules import feature_maps, positions

GATES = ("gla", "hgrn2", "scalar", "none")
GATE_SOURCES = ("keys", "projection")


@flax.struct.dataclass
class State:
    """Fields of Liger's state.

    Attributes:
      S_BHFV: matrix state of the linear attention.
      cache: keys and values of the softmax attention's window; None without a window.
    """

    S_BHFV: Array
    cache: attention.KeyValueCache | None


class Liger(attention.LinearizedAttention):
    """Liger attention (Lan et al., arXiv 2503.01496, eqs. 5-9 and table 1).

        S_t = diag(a_t) S_{t-1} + phi(k_t) v_t^T
        o_t = mix S_t^T phi(q_t) + (1 - mix) o_window

    q, k, v, W_o and their options are those of `attention.Attention`, so that a softmax layer's
    weights fit as they are; by default there are no new parameters. phi is a softmax over the
    channels of a head, applied to q and k before the rotation. o_window is softmax attention, with
    the rotation, over the last `window` tokens. The decay a_t is computed in float32 from z = k
    before the rotation, by `gate`:

        gla      log a = logsigmoid(z) / gate_temperature, per channel
        hgrn2    log a = logsigmoid(z) per channel, and 1 - sigmoid(z) in place of phi(k)
        scalar   log a = logsigmoid(mean of a head's z) / gate_temperature
        none     a = 1

    The paper pools the keys for the gate, but its released code does so over windows of one token:
    the gate's logits are the keys themselves.

    Attributes:
      window: None leaves the softmax part out, and then mix is 1.
      gate_source: "keys", or "projection" for a new W_g x, random at first: the paper's ablation.
      feature_map, features: of phi; a learned one is another of its ablations.
    """

    window: int | None = 64
    mix: float = 0.5
    gate: str = "gla"
    gate_source: str = "keys"
    gate_temperature: float = 16.0
    feature_map: str = "softmax"
    features: int | None = None

    def _sizes(self):
        self.check_choice("gate", GATES)
        self.check_choice("gate_source", GATE_SOURCES)
        if self.gate in ("gla", "hgrn2") and self.feature_map != "softmax":
            raise ValueError(
                f"liger: gate {self.gate!r} is one number per key channel, so feature_map must be "
                f"'softmax'; got {self.feature_map!r}. Take gate 'scalar' or 'none' with it"
            )
        return super()._sizes()

    def _log_decay(self, z_BTGK):
        z_BTGK = z_BTGK.astype(jnp.float32)
        if self.gate == "none":
            return None
        if self.gate == "scalar":
            return jax.nn.log_sigmoid(jnp.mean(z_BTGK, axis=-1)) / self.gate_temperature
        return jax.nn.log_sigmoid(z_BTGK) / (1.0 if self.gate == "hgrn2" else self.gate_temperature)

    def _map(self, name: str) -> feature_maps.FeatureMap:
        return feature_maps.FeatureMap(self.feature_map, self.features, name=f"{name}_map")

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, G, K = self._sizes()
        B, T, _ = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGV = self._queries_keys_values(x_BTD)
        z_BTGK = k_BTGK
        if self.gate_source == "projection" and self.gate != "none":
            z_BTGK = self.project_heads(x_BTD, G, K, "gate")

        # The linear part, before the rotation.
        log_decay = self._log_decay(z_BTGK)
        if self.gate == "hgrn2":
            phi_k_BTHF = self._of_all_heads(jax.nn.sigmoid(-z_BTGK.astype(jnp.float32)))
            phi_k_BTHF = phi_k_BTHF.astype(self.dtype)
        else:
            phi_k_BTHF = self._map("k")(self._of_all_heads(k_BTGK))
        o_BTHV, S_BHFV = operators.linear_attention(
            self._map("q")(q_BTHK),
            phi_k_BTHF,
            self._of_all_heads(v_BTGV),
            None if log_decay is None else self._of_all_heads(log_decay),
            scale=1.0,
            **self.recurrence_keywords(None if state is None else state.S_BHFV, segment_ids_BT),
        )
        # The window's softmax, after it.
        cache = None
        if self.window is not None:
            cache = None if state is None else state.cache
            offset_B = None if cache is None else cache.next_position_B
            position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
            q_BTHK, k_BTGK = (self._rotate(x, position_BT) for x in (q_BTHK, k_BTGK))
            window_BTHV, cache = self._attend(
                q_BTHK, k_BTGK, v_BTGV, position_BT, segment_ids_BT, cache
            )
            o_BTHV = self.mix * o_BTHV + (1.0 - self.mix) * window_BTHV
        return self._output(x_BTD, o_BTHV), State(S_BHFV, cache)

    def init_state(self, batch):
        H, _, K = self._sizes()
        F = feature_maps.output_dim(self.feature_map, K, self.features)
        S_BHFV = jnp.zeros((batch, H, F, K), jnp.float32)
        return State(S_BHFV, None if self.window is None else super().init_state(batch))
