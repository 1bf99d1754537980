"""Decay gates that several mixers share: their formulas and initial values."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.modules import layers


def inverse_softplus(y: Array) -> Array:
    """Returns x with softplus(x) = y, for y > 0: y + log(-expm1(-y))."""
    return y + jnp.log(-jnp.expm1(-y))


def log_uniform_dt_bias(dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4):
    """Returns an initializer of dt_bias with softplus(dt_bias) ~ LogU(dt_min, dt_max).

    Values of softplus(dt_bias) below dt_floor are raised to it (Mamba, arXiv 2312.00752, section
    3.6).
    """

    def init(key, shape, dtype=jnp.float32):
        log_dt = jax.random.uniform(key, shape, dtype, jnp.log(dt_min), jnp.log(dt_max))
        return inverse_softplus(jnp.maximum(jnp.exp(log_dt), dt_floor))

    return init


def log_uniform_A(A_min: float, A_max: float):
    """Returns an initializer of A_log with exp(A_log) ~ U(A_min, A_max).

    Values are drawn from (A_min, A_max], so that the logarithm is finite for A_min = 0.
    """

    def init(key, shape, dtype=jnp.float32):
        return jnp.log(A_max - jax.random.uniform(key, shape, dtype, 0.0, A_max - A_min))

    return init


class SoftplusDecay(nn.Module):
    """Computes Mamba-2's decay per head and token, log a_t = -exp(A_log) dt_t.

    dt_t = softplus(x_t + dt_bias) (arXiv 2405.21060, section 7). A call on x_BTH returns
    (log_decay_BTH, dt_BTH), float32.

    Attributes:
      A_min, A_max: exp(A_log) ~ U(A_min, A_max) at the start; Mamba-2 takes (1, 16), Gated DeltaNet
        (0, 16).
      dt_bias_init: initializer of dt_bias; None is `log_uniform_dt_bias()`, Mamba-2's.
    """

    A_min: float = 1.0
    A_max: float = 16.0
    dt_bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x_BTH: Array) -> tuple[Array, Array]:
        H = x_BTH.shape[-1]
        A_init = log_uniform_A(self.A_min, self.A_max)
        A_log_H = layers.gate_parameter(self, "A_log", A_init, (H,))
        dt_bias_init = self.dt_bias_init or log_uniform_dt_bias()
        dt_bias_H = layers.gate_parameter(self, "dt_bias", dt_bias_init, (H,))
        dt_BTH = jax.nn.softplus(x_BTH.astype(jnp.float32) + dt_bias_H[None, None])
        return -jnp.exp(A_log_H)[None, None] * dt_BTH, dt_BTH
