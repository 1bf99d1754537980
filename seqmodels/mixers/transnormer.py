"""TransNormer's linear layers: no denominator, a norm over the whole width instead."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType
from seqmodels.mixers import base
from seqmodels.modules import feature_maps, layers, norms, positions
from seqmodels.operators import linear_attention

# On q, k and v: Xavier uniform with gain 1/sqrt(2).
QKV_INIT = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
OUTPUT_INIT = nn.initializers.xavier_uniform()
MAPS = {"t1": "elu", "t2": "elu_plus_one"}


class TransNormer(base.ChunkedMixer):
    """TransNormer's NormAttention (Qin et al., arXiv 2210.10340, section 4.1).

        o_t = sum_{s<=t} (phi(q_t) . phi(k_s)) v_s
        y_t = W_o Norm(o_t)

    q, k, v = W x + b; W_o has a bias, too. The norm is over all heads together. There is neither a
    denominator nor a factor 1/sqrt(K). In the paper's stack the second half of the layers are of
    this kind, and the first half are `transnormer_local`. Weights start Xavier uniform, those of q,
    k and v with gain 1/sqrt(2).

    Attributes:
      num_heads: H; K = V = D / H.
      variant: "t1" has phi = elu, so weights may be negative; "t2" has phi = elu + 1.
      norm: a name of `norms.NORMS`, or "gated_rms_norm".
      lrpe: whether `LRPE` encodes relative positions in phi(q) and phi(k), which doubles K in the
        state.
    """

    num_heads: int = 4
    variant: str = "t2"
    norm: str = "layer_norm"
    lrpe: bool = False

    def _sizes(self) -> tuple[int, int]:
        self.check_choice("variant", MAPS)
        self.check_choice("norm", NORMS)
        return self.num_heads, self.width_per_head(self.num_heads)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q_BTHK, k_BTHK, v_BTHK = (
            self.project_heads(x_BTD, H, K, name, use_bias=True, kernel_init=QKV_INIT)
            for name in "qkv"
        )
        phi = feature_maps.FeatureMap(MAPS[self.variant], name="phi")
        q_BTHK, k_BTHK = phi(q_BTHK), phi(k_BTHK)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        if self.lrpe:
            rotate = LRPE(name="lrpe")
            q_BTHK, k_BTHK = rotate(q_BTHK, position_BT), rotate(k_BTHK, position_BT)
        o_BTHK, S_BHKV = linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            scale=1.0,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        o_BTD = NORMS[self.norm](name="o_norm")(o_BTHK.reshape(x_BTD.shape))
        y_BTD = self.merge_heads(o_BTD, use_bias=True, kernel_init=OUTPUT_INIT)
        return y_BTD, base.PositionedState(S_BHKV, position_BT[:, -1] + 1)

    def init_state(self, batch):
        H, K = self._sizes()
        return base.PositionedState.empty(batch, H, 2 * K if self.lrpe else K, K)


class LRPE(nn.Module):
    """Linearized relative positional encoding (arXiv 2307.09270; TransNormerLLM, arXiv 2307.14995).

        x_t -> [x_t cos(theta t) || x_t sin(theta t)]

    of queries and keys at position t, so that q_t . k_s becomes sum_i q_i k_i cos(theta_i (t - s)).
    A call on x_BTHK returns (B, T, H, 2K). theta_HK is learned; it starts at 10000^(-2 i / (H K)),
    where i counts the channels of all heads.
    """

    @nn.compact
    def __call__(self, x_BTHK: Array, position_BT: Array) -> Array:
        H, K = x_BTHK.shape[2:]

        def init(key, shape, dtype):
            del key
            return (10_000.0 ** (-2.0 * jnp.arange(H * K, dtype=dtype) / (H * K))).reshape(shape)

        init = layers.undecayed(init, ("heads", None))
        theta_HK = self.param("theta", init, (H, K), jnp.float32)
        angle_BTHK = position_BT.astype(jnp.float32)[..., None, None] * theta_HK[None, None]
        x_f32 = x_BTHK.astype(jnp.float32)
        turned = [x_f32 * jnp.cos(angle_BTHK), x_f32 * jnp.sin(angle_BTHK)]
        return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)


class GatedRMSNorm(nn.Module):
    """Computes the gated norm RMSNorm(x) * sigmoid(gate * x) (ReLA, arXiv 2104.07012, section 3).

    gate is a learned vector over the last axis, and starts at 1.
    """

    eps: float = 1e-5
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = layers.undecayed(nn.initializers.ones, ("norm",))
        gate = self.param("gate", init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        gate = jax.nn.sigmoid(gate.reshape((1,) * (x.ndim - 1) + (-1,)) * x.astype(jnp.float32))
        return norms.RMSNorm(self.eps, param_dtype=self.param_dtype, name="rms")(x) * gate.astype(
            x.dtype
        )


NORMS = norms.NORMS | {"gated_rms_norm": GatedRMSNorm}
