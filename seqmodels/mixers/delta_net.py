"""DeltaNet, and the base class of DeltaNet, Gated DeltaNet and DeltaProduct."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base, gates
from seqmodels.modules import layers, norms
from seqmodels.operators import delta_rule


@flax.struct.dataclass
class State:
    """Fields of the state of DeltaNet and its relatives.

    Attributes:
      S_BHKV: the delta rule's matrix state.
      q_tail, k_tail, v_tail: the last inputs of the convolutions on q, k and v; None without them.
    """

    S_BHKV: Array
    q_tail: Array | None
    k_tail: Array | None
    v_tail: Array | None


class DeltaRuleMixer(base.ChunkedMixer):
    """Base class of DeltaNet, Gated DeltaNet and DeltaProduct: n delta-rule steps per token.

        S_t = (I - beta_t,n k_t,n k_t,n^T) ... (I - beta_t,1 k_t,1 k_t,1^T) alpha_t S_{t-1}
              + what the n steps write
        o_t = S_t^T q_t / sqrt(K)

    q, k, v = silu(conv(W x)), q and k then scaled to unit length on each head; beta =
    sigmoid(W_b x) per head; alpha = exp(-exp(A_log) softplus(W_a x + dt_bias)) per head, or 1;
    y = W_o RMSNorm(o), or W_o (RMSNorm(o) * silu(W_g x)). The norm is on each head, with one gain
    (V,) for all heads. At the start exp(A_log) ~ U(0, 16) and softplus(dt_bias) ~ LogU(1e-3, 0.1).

    Attributes:
      num_heads: G heads of q and k.
      num_v_heads: H heads of v, beta and alpha; None is G.
      head_dim: K; None is key_width * D / G, rounded down.
      expand_v: V / K.
      conv_width: number of taps; None leaves the convolutions out (silu stays).
      allow_neg_eigval: whether beta = 2 sigmoid(W_b x), in [0, 2], so that I - beta k k^T may
        reflect (arXiv 2411.12537).
      norm_eps: epsilon of the output's RMSNorm.

    Subclasses set key_width, num_householder (n), use_forget_gate (alpha) and use_gate (W_g), as
    constants or as options. The recurrence is `kernels_pallas.delta_rule`, whose chunk algebra is
    in kernels_pallas/ops/delta_rule/naive_chunk.py.
    """

    num_heads: int = 4
    num_v_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 1.0
    conv_width: int | None = 4
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-5

    key_width = 1.0
    num_householder = 1
    use_forget_gate = False
    use_gate = False

    def _sizes(self) -> tuple[int, int, int, int]:
        G, H = self.num_heads, self.num_v_heads or self.num_heads
        name = type(self).__name__
        if H % G:
            raise ValueError(f"{name}: num_heads {G} must divide num_v_heads {H}")
        K = self.head_dim or int(self.key_width * self.d_model) // G
        V = K * self.expand_v
        if K < 1 or V < 1 or not math.isclose(V, round(V)):
            raise ValueError(
                f"{name}: head_dim {K} and head_dim * expand_v = {V} must be whole and positive; "
                f"with d_model {self.d_model} and num_heads {G}, set head_dim or expand_v"
            )
        if self.num_householder < 1:
            raise ValueError(
                f"{name}: num_householder must be at least 1; got {self.num_householder}"
            )
        return G, H, K, round(V)

    def _tail_widths(self) -> tuple[int, int, int]:
        """Returns the numbers of channels of the convolutions on q, k and v."""
        G, H, K, V = self._sizes()
        return G * K, self.num_householder * G * K, self.num_householder * H * V

    def _project_conv(self, x_BTD, width: int, name: str, unit_heads, segment_ids_BT, tail):
        """Returns silu(conv(W x)) of `width` channels, and the convolution's last inputs.

        unit_heads: number of heads whose channels are scaled to unit length; None scales nothing.
        tail: the convolution's last inputs before x. `name` is that of W's parameters.
        """
        z = self.project(x_BTD, width, name)
        if self.conv_width is not None:
            conv = self.conv(self.conv_width, l2_norm_heads=unit_heads, name=f"{name}_conv")
            return conv(z, segment_ids_BT, tail)
        z = nn.silu(z)
        if unit_heads is not None:
            z = norms.l2_norm(z.reshape(*z.shape[:-1], unit_heads, -1)).reshape(z.shape)
        return z, None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        (G, H, K, V), n = self._sizes(), self.num_householder
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        # q, k, v and the gates; k, v and beta have a copy per step.
        (q, q_tail), (k, k_tail), (v, v_tail) = (
            self._project_conv(x_BTD, width, name, unit_heads, segment_ids_BT, tail)
            for width, name, unit_heads, tail in zip(
                self._tail_widths(),
                "qkv",
                (G, n * G, None),
                (state.q_tail, state.k_tail, state.v_tail),
            )
        )
        beta = jax.nn.sigmoid(self.project(x_BTD, n * H, "b").astype(jnp.float32))
        log_decay = None
        if self.use_forget_gate:
            log_decay, _ = gates.SoftplusDecay(name="decay", A_min=0.0)(self.project(x_BTD, H, "a"))
        # A token is n steps in time. It decays once, on the first; it is read once, after the last.
        ids = None if segment_ids_BT is None else jnp.repeat(segment_ids_BT, n, axis=1)
        o, S_BHKV = delta_rule(
            _on_step(q.reshape(B, T, G, K), n, last=True),
            k.reshape(B, T * n, G, K),
            v.reshape(B, T * n, H, V),
            beta.reshape(B, T * n, H) * (2.0 if self.allow_neg_eigval else 1.0),
            None if log_decay is None else _on_step(log_decay, n, last=False),
            **self.recurrence_keywords(state.S_BHKV, ids),
        )
        o_BTHV = norms.RMSNorm(self.norm_eps, name="o_norm")(o.reshape(B, T, n, H, V)[:, :, n - 1])
        if self.use_gate:
            o_BTHV = layers.gated(o_BTHV, self.project_heads(x_BTD, H, V, "g"), nn.silu)
        return self.merge_heads(o_BTHV), State(S_BHKV, q_tail, k_tail, v_tail)

    def init_state(self, batch):
        _, H, K, V = self._sizes()
        tails = (None, None, None)
        if self.conv_width is not None:
            tails = (self.conv_tail(batch, self.conv_width, n) for n in self._tail_widths())
        return State(jnp.zeros((batch, H, K, V), jnp.float32), *tails)


def _on_step(x: Array, n: int, *, last: bool) -> Array:
    """Expands an array with a row per token to n rows per token, (B, T, ...) to (B, T n, ...).

    x becomes the first or, with `last`, the last of each token's n rows; the others are zeros.
    """
    before, after = (n - 1, 0) if last else (0, n - 1)
    padded = jnp.pad(x[:, :, None], ((0, 0), (0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))
    return padded.reshape(x.shape[0], -1, *x.shape[2:])


class DeltaNet(DeltaRuleMixer):
    """DeltaNet (Yang et al., arXiv 2406.06484, eq. 4 and section 3.3).

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t / sqrt(K)

    Projections, initial values and the other options are `DeltaRuleMixer`'s, with n = 1 and no
    decay.

    Attributes:
      use_gate: whether y = W_o (RMSNorm(o) * silu(W_g x)); else y = W_o RMSNorm(o).
    """

    use_gate: bool = False
