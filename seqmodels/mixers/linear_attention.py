"""Linear attention with a choice of feature map."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import feature_maps, norms, positions
from seqmodels.operators import linear_attention


@flax.struct.dataclass
class State:
    """Fields of linear attention's state.

    Attributes:
      S_BHFV: sum_s phi(k_s) v_s^T, with sum_s phi(k_s) as a last column where the output is
        normalised.
      next_position_B: position of the next token in its document.
    """

    S_BHFV: Array
    next_position_B: Array


class LinearAttention(base.ChunkedMixer):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236, eqs. 8-9).

        o_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + eps)
        w_ts = phi_q(q_t) . phi_k(k_s)

    q, k, v = W x, q and k rotated before their maps if `rope_base` is given; y = W_o o. A column of
    ones beside v computes the denominator in the same pass of the operator.

    Attributes:
      num_heads: H.
      head_dim: K and V; None is D / H.
      q_map, k_map: phi_q and phi_k, names in `feature_maps`; k_map None takes q_map's name, with
        parameters of its own.
      features: width E of the learned maps; None is K.
      normalize: whether o_t is divided by the sum of weights, which takes maps that are never
        negative; else o_t = F^-1/2 sum_s w_ts v_s.
      eps: added to the sum of weights; LoLCATs takes 1e-12.
      rope_base: base of the rotary angles; None leaves the rotation out.
      output_norm: name in `norms.NORMS` of a norm on each head of o; None is no norm.
      use_bias: whether the projections have biases.
    """

    num_heads: int = 4
    head_dim: int | None = None
    q_map: str = "elu_plus_one"
    k_map: str | None = None
    features: int | None = None
    normalize: bool = True
    eps: float = 1e-6
    rope_base: float | None = None
    output_norm: str | None = None
    use_bias: bool = False

    def _sizes(self) -> tuple[int, int, int]:
        """Returns H, K and F."""
        H, maps = self.num_heads, (self.q_map, self.k_map or self.q_map)
        K = self.head_dim or self.width_per_head(H)
        dims = [feature_maps.output_dim(name, K, self.features) for name in maps]
        if dims[0] != dims[1]:
            raise ValueError(
                f"linear_attention: q_map {maps[0]!r} gives {dims[0]} features and k_map "
                f"{maps[1]!r} {dims[1]}; they must be equal"
            )
        signed = [name for name in maps if not feature_maps.is_nonnegative(name)]
        if self.normalize and signed:
            raise ValueError(
                f"linear_attention: feature map {signed[0]!r} takes both signs, so the sum of "
                "weights may be zero; set normalize=False (and an output_norm), or take a map that "
                "is never negative"
            )
        if self.output_norm is not None:
            self.check_choice("output_norm", norms.NORMS)
        return H, K, dims[0]

    def _map(self, kind: str, name: str) -> feature_maps.FeatureMap:
        return feature_maps.FeatureMap(kind, self.features, name=name)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K, _ = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q_BTHK, k_BTHK, v_BTHV = (
            self.project_heads(x_BTD, H, K, name, use_bias=self.use_bias) for name in "qkv"
        )
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        if self.rope_base is not None:
            q_BTHK = positions.rope(q_BTHK, position_BT, self.rope_base)
            k_BTHK = positions.rope(k_BTHK, position_BT, self.rope_base)
        if self.normalize:
            v_BTHV = jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1)
        o_BTHV, S_BHFV = linear_attention(
            self._map(self.q_map, "q_map")(q_BTHK),
            self._map(self.k_map or self.q_map, "k_map")(k_BTHK),
            v_BTHV,
            scale=1.0 if self.normalize else None,
            **self.recurrence_keywords(state.S_BHFV, segment_ids_BT),
        )
        if self.normalize:
            o_BTHV = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + self.eps)
        if self.output_norm is not None:
            o_BTHV = norms.NORMS[self.output_norm](name="o_norm")(o_BTHV)
        y_BTD = self.merge_heads(o_BTHV, use_bias=self.use_bias)
        return y_BTD, State(S_BHFV, position_BT[:, -1] + 1)

    def init_state(self, batch):
        H, K, F = self._sizes()
        V = K + 1 if self.normalize else K
        S_BHFV = jnp.zeros((batch, H, F, V), jnp.float32)
        return State(S_BHFV, jnp.zeros((batch,), jnp.int32))
