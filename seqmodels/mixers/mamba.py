"""Mamba (S6): a state space model with a decay per channel and state."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base, gates
from seqmodels.modules import layers


@flax.struct.dataclass
class State:
    """Fields of Mamba's state: h_BEK of the last token, and the convolution's last inputs."""

    h_BEK: Array
    x_tail: Array


class Mamba(base.Mixer):
    """Mamba (Gu & Dao, arXiv 2312.00752, section 3 and appendix C).

        h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T
        o_t = h_t C_t + D * x_t

    x = silu(conv(W_x u) + bias) of the layer's input u; B, C = W_B x, W_C x; dt = softplus(W_dt W_r
    x + dt_bias) per channel; y = W_o (o * silu(W_z u)). A = -exp(A_log) is (E, K), and the skip
    weight D is (E,). At the start A_log = log(1..K) in every channel, D = 1, softplus(dt_bias) ~
    LogU(1e-3, 0.1) and W_dt ~ U(-1, 1) / sqrt(R).

    Attributes:
      expand: E = expand * d_model is the inner width, that of x and z.
      d_state: K, the number of states per channel.
      dt_rank: R, the width of W_r x; None is d_model / 16, rounded up.
      conv_width: number of taps.
      negative_eigenvalues: whether a decay s becomes 2s - 1, in [-1, 1] (Grazzi et al., arXiv
        2411.12537, section 4.1).
      use_bias, conv_bias: whether W_x, W_z and W_o, and the convolution, have biases.
      chunk_size: number of tokens whose (E, K) states are in memory at once, in both passes.
    """

    expand: int = 2
    d_state: int = 16
    dt_rank: int | None = None
    conv_width: int = 4
    negative_eigenvalues: bool = False
    use_bias: bool = False
    conv_bias: bool = True
    chunk_size: int = 64

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        E, K, R = self.expand * self.d_model, self.d_state, self.dt_rank or -(-self.d_model // 16)
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        conv = self.conv(self.conv_width, use_bias=self.conv_bias, name="x_conv")
        x_BTE = self.project(x_BTD, E, "x", use_bias=self.use_bias)
        x_BTE, x_tail = conv(x_BTE, segment_ids_BT, state.x_tail)
        B_BTK = self.project(x_BTE, K, "B", axes=("heads", None))
        C_BTK = self.project(x_BTE, K, "C", axes=("heads", None))
        dt_BTR = self.project(x_BTE, R, "dt_low_rank", axes=("heads", None))
        dt_BTE = self.project(dt_BTR, E, "dt", axes=(None, "heads"), kernel_init=_uniform(R**-0.5))
        dt_bias_E = layers.gate_parameter(self, "dt_bias", gates.log_uniform_dt_bias(), (E,))
        A_log_EK = layers.gate_parameter(self, "A_log", _log_integers, (E, K))
        D_E = layers.gate_parameter(self, "D", nn.initializers.ones, (E,))

        # The step of every channel; documents start from nothing.
        dt_BTE = jax.nn.softplus(dt_BTE.astype(jnp.float32) + dt_bias_E[None, None])
        start_BT = jnp.zeros(x_BTD.shape[:2], bool)
        if segment_ids_BT is not None:
            start_BT = operators.starts(segment_ids_BT)
        arrays = {
            "x_BTE": (x_BTE, "BTD"),
            "dt_BTE": (dt_BTE, "BTD"),
            "B_BTK": (B_BTK, "BTK"),
            "C_BTK": (C_BTK, "BTK"),
            "A_EK": (-jnp.exp(A_log_EK), "DK"),
            "start_BT": (start_BT, "BT"),
            "h_BEK": (state.h_BEK, "BDK"),
        }
        o_BTE, h_BEK = operators.on_parts(self._scan, arrays, ("BTD", "BDK"))
        o_BTE = (o_BTE + x_BTE * D_E[None, None]).astype(self.dtype)
        z_BTE = self.project(x_BTD, E, "z", use_bias=self.use_bias)
        o_BTE = layers.gated(o_BTE, z_BTE, nn.silu)
        y_BTD = self.project(
            o_BTE, self.d_model, "o", axes=("heads", "embed"), use_bias=self.use_bias
        )
        return y_BTD, State(h_BEK, x_tail)

    @nn.nowrap
    def _scan(self, axis_name, x_BTE, dt_BTE, B_BTK, C_BTK, A_EK, start_BT, h_BEK):
        """Runs the recurrence over chunks of time; returns o_BTE = h C and the final state h_BEK.

        The backward pass recomputes each chunk's states. Where time is split over `axis_name`, the
        shard is scanned twice: first without outputs, for its total decay and its local state.
        """
        B, T, E = x_BTE.shape
        K = A_EK.shape[1]
        if self.chunk_size < 1:
            raise ValueError(f"mamba: chunk_size must be at least 1; got {self.chunk_size}")
        C = min(self.chunk_size, T)
        N = math.ceil(T / C)
        h_BEK = h_BEK.astype(jnp.promote_types(h_BEK.dtype, x_BTE.dtype))  # float64 where x is

        def chunks(z):
            # Tokens added at the end have dt = 0: they leave the state as it is.
            padded = jnp.pad(z, ((0, 0), (0, N * C - T)) + ((0, 0),) * (z.ndim - 2))
            return jnp.moveaxis(padded.reshape(B, N, C, *z.shape[2:]), 1, 0)

        def states(h_BEK, inputs):
            x_BCE, dt_BCE, B_BCK, _, start_BC = inputs
            decay_BCEK = jnp.exp(dt_BCE[..., None] * A_EK[None, None])
            if self.negative_eigenvalues:
                decay_BCEK = 2.0 * decay_BCEK - 1.0
            decay_BCEK = jnp.where(start_BC[..., None, None], 0.0, decay_BCEK)
            write_BCEK = (dt_BCE * x_BCE)[..., None] * B_BCK.astype(jnp.float32)[:, :, None]
            h_BCL, h_BL = operators.diagonal_scan(
                write_BCEK.reshape(B, C, E * K),
                decay_BCEK.reshape(B, C, E * K),
                initial_state=h_BEK.reshape(B, E * K),
                implementation=self.implementation,
            )
            return h_BCL.reshape(B, C, E, K), h_BL.reshape(B, E, K), decay_BCEK

        def without_outputs(carry, inputs):
            h_BEK, decay_BEK = carry
            _, h_BEK, decay_BCEK = states(h_BEK, inputs)
            return (h_BEK, decay_BEK * jnp.prod(decay_BCEK, axis=1)), None

        def one_chunk(h_BEK, inputs):
            h_BCEK, h_BEK, _ = states(h_BEK, inputs)
            return h_BEK, jnp.einsum("BCEK,BCK->BCE", h_BCEK, inputs[3].astype(jnp.float32))

        def over_chunks(f, carry):
            return jax.lax.scan(jax.checkpoint(f, prevent_cse=False), carry, inputs)

        inputs = tuple(chunks(z) for z in (x_BTE, dt_BTE, B_BTK, C_BTK, start_BT))
        final_BEK = None
        if axis_name is not None:
            part = (jnp.zeros_like(h_BEK), jnp.ones_like(h_BEK))
            (part_BEK, decay_BEK), _ = over_chunks(without_outputs, part)
            h_BEK, final_BEK = operators.entering_state(axis_name, part_BEK, decay_BEK, h_BEK)
        last_BEK, o_NBCE = over_chunks(one_chunk, h_BEK)
        o_BTE = jnp.moveaxis(o_NBCE, 0, 1).reshape(B, N * C, E)[:, :T]
        return o_BTE, last_BEK if final_BEK is None else final_BEK

    def init_state(self, batch):
        E = self.expand * self.d_model
        h_BEK = jnp.zeros((batch, E, self.d_state), jnp.float32)
        return State(h_BEK, self.conv_tail(batch, self.conv_width, E))


def _uniform(bound: float):
    """Returns the initializer U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _log_integers(key, shape, dtype=jnp.float32):
    """Initializes A_log to log(1), log(2), ... along the last axis (S4D-Real, arXiv 2206.11893)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype))[None], shape)
