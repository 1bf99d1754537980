"""mLSTM: a matrix memory with an exponential or a sigmoid input gate."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import layers, norms

INPUT_GATES = ("exp", "sigmoid")


@flax.struct.dataclass
class State:
    """Fields of the mLSTM's state: its memory C and normaliser n, scaled by e^-m.

    Attributes:
      S_BHKV: [C || n] e^-m, with n as the last column; C e^-m where the output is not normalised.
      m_BH: m, the log of the scale; None, as m = 0, with a sigmoid input gate.
    """

    S_BHKV: Array
    m_BH: Array | None


class MLSTM(base.ChunkedMixer):
    """mLSTM (Beck et al., arXiv 2405.04517, eqs. 19-27; the layer of arXiv 2503.13427).

        C_t = f_t C_{t-1} + i_t k_t v_t^T
        n_t = f_t n_{t-1} + i_t k_t
        h_t = C_t^T q_t / max(|n_t . q_t|, 1), q scaled by K^-1/2

    f = sigmoid(W_f x + b_f), i = exp(W_i x + b_i) or sigmoid(W_i x + b_i) (arXiv 2503.14376), each
    argument z capped to c tanh(z / c); y = W_o (sigmoid(W_g x) * LayerNorm(h)), the norm on each
    head with a gain per channel. At the start W_i = W_f = 0, b_i = -10 and b_f = linspace(3, 6)
    over heads.

    With the exponential gate C and n are scaled by e^-m_t, m_t = max(log f_t + m_{t-1}, log i_t),
    which `stabiliser` computes beforehand from the gates alone. Then f_t e^(m_{t-1} - m_t) <= 1 is
    an ordinary decay, i_t e^-m_t <= 1 scales the key, a column of ones beside v computes n, and the
    denominator is max(|n . q|, e^-m) + eps.

    Attributes:
      num_heads: H.
      qk_dim_factor, v_dim_factor: K = qk_dim_factor D / H and V = v_dim_factor D / H.
      input_gate: "exp" or "sigmoid".
      normalize: whether h is divided as above; False, which takes the sigmoid gate, has h = C^T q.
      gate_soft_cap: c; None leaves the gates' arguments uncapped.
      input_gate_bias: the value at which b_i starts.
      eps: added to the denominator.
      norm_eps: epsilon of the LayerNorm.
    """

    num_heads: int = 4
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    input_gate: str = "exp"
    normalize: bool = True
    gate_soft_cap: float | None = 15.0
    input_gate_bias: float = -10.0
    eps: float = 1e-6
    norm_eps: float = 1e-6

    def _sizes(self) -> tuple[int, int, int]:
        H = self.num_heads
        self.check_choice("input_gate", INPUT_GATES)
        if self.input_gate == "exp" and not self.normalize:
            raise ValueError(
                "mlstm: the exponential input gate needs normalize=True; the sigmoid gate can do "
                "without"
            )
        K = self.width_per_head(H, self.qk_dim_factor)
        return H, K, self.width_per_head(H, self.v_dim_factor)

    def _gate(self, x_BTD: Array, name: str, bias_init) -> Array:
        """Returns a gate's argument W x + b, soft-capped, (B, T, H) float32.

        name: of the parameters. bias_init: initializer of b; W starts at 0.
        """
        gate_BTH = self.project(
            x_BTD,
            self.num_heads,
            name,
            use_bias=True,
            kernel_init=nn.initializers.zeros,
            bias_init=bias_init,
        ).astype(jnp.float32)
        if self.gate_soft_cap is None:
            return gate_BTH
        return self.gate_soft_cap * jnp.tanh(gate_BTH / self.gate_soft_cap)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K, V = self._sizes()
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        log_f_BTH = jax.nn.log_sigmoid(self._gate(x_BTD, "f", _linspace_3_6))
        i_BTH = self._gate(x_BTD, "i", nn.initializers.constant(self.input_gate_bias))
        m_BH, floor_BTH = None, 1.0
        if state.m_BH is not None:  # the exponential gate
            # m only sets the scale numerator, denominator and state share: the output's derivative
            # with respect to it is 0 but for the share eps / denominator of eps. It is a constant
            # to the backward pass, in all places alike, so that no gradient meets e^-m (large) or a
            # tie of the maximum.
            m_BTH = jax.lax.stop_gradient(stabiliser(log_f_BTH, i_BTH, state.m_BH, segment_ids_BT))
            previous_BTH = operators.previous(m_BTH, state.m_BH, "BTH")
            log_decay_BTH = log_f_BTH + jax.lax.stop_gradient(previous_BTH) - m_BTH
            # The scan's rounding may leave the decay a hair above 0; its gradient stays 1.
            log_decay_BTH -= jax.lax.stop_gradient(jnp.maximum(log_decay_BTH, 0.0))
            i_BTH, floor_BTH = jnp.exp(i_BTH - m_BTH), jnp.exp(-m_BTH)
            m_BH = m_BTH[:, -1]
        else:
            i_BTH, log_decay_BTH = jax.nn.sigmoid(i_BTH), log_f_BTH
        v_BTHV = self.project_heads(x_BTD, H, V, "v")
        if self.normalize:
            v_BTHV = jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1)
        h_BTHV, S_BHKV = operators.linear_attention(
            self.project_heads(x_BTD, H, K, "q"),
            self.project_heads(x_BTD, H, K, "k") * i_BTH[..., None].astype(self.dtype),
            v_BTHV,
            log_decay_BTH,
            **self.recurrence_keywords(state.S_BHKV, segment_ids_BT),
        )
        if self.normalize:
            h_BTHV, weight_BTH = jnp.split(h_BTHV.astype(jnp.float32), [V], axis=-1)
            weight_BTH = jnp.maximum(jnp.abs(weight_BTH[..., 0]), floor_BTH) + self.eps
            h_BTHV = (h_BTHV / weight_BTH[..., None]).astype(self.dtype)
        gate_BTHV = self.project_heads(x_BTD, H, V, "g")
        h_BTHV = HeadLayerNorm(self.norm_eps, name="h_norm")(h_BTHV)
        h_BTHV = layers.gated(h_BTHV, gate_BTHV, jax.nn.sigmoid)
        return self.merge_heads(h_BTHV), State(S_BHKV, m_BH)

    def init_state(self, batch):
        H, K, V = self._sizes()
        m_BH = jnp.zeros((batch, H), jnp.float32) if self.input_gate == "exp" else None
        return State(jnp.zeros((batch, H, K, V + self.normalize), jnp.float32), m_BH)


def stabiliser(
    log_f_BTH: Array, i_BTH: Array, m_BH: Array, segment_ids_BT: Array | None = None
) -> Array:
    """Computes the mLSTM's log scales m_t = max(log f_t + m_{t-1}, i_t), (B, T, H) float32.

    A token is the map m -> max(a + m, b). Such maps compose to such maps: (a', b') after (a, b) is
    (a + a', max(b + a', b')), so that one associative scan computes all m_t.

    i_BTH: logs of the input gates. m_BH: m before the first token. Later documents of a row start
      from m = 0.
    """
    a_BTH, b_BTH = log_f_BTH, i_BTH
    if segment_ids_BT is not None:
        start_BT1 = operators.starts(segment_ids_BT)[..., None]
        a_BTH = jnp.where(start_BT1, -jnp.inf, log_f_BTH)
        b_BTH = jnp.where(start_BT1, jnp.maximum(log_f_BTH, i_BTH), i_BTH)

    def compose(first, then):
        return first[0] + then[0], jnp.maximum(first[1] + then[0], then[1])

    a_BTH, b_BTH = operators.associative_scan(compose, (a_BTH, b_BTH), "BTH")
    return jnp.maximum(a_BTH + m_BH[:, None], b_BTH)


def _linspace_3_6(key, shape, dtype=jnp.float32):
    del key
    return jnp.linspace(3.0, 6.0, *shape, dtype=dtype)


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head in float32: (h - mean) / sqrt(var + eps) * gain_HV, without a bias."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, h_BTHV: Array) -> Array:
        init = layers.undecayed(nn.initializers.ones, ("heads", "norm"))
        scale_HV = self.param("scale", init, h_BTHV.shape[2:], jnp.float32)
        h_f32 = h_BTHV.astype(jnp.float32)
        h_f32 -= jnp.mean(h_f32, axis=-1, keepdims=True)
        return (norms.srms_norm(h_f32, self.eps) * scale_HV[None, None]).astype(h_BTHV.dtype)
