"""The linear recurrent unit: a diagonal, complex, time-invariant recurrence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.mixers import base
from seqmodels.modules import layers
from seqmodels.operators import diagonal_scan


class LRU(base.Mixer):
    """Linear recurrent unit (Orvieto et al., arXiv 2303.06349, section 3 and appendix A).

        h_t = lambda * h_{t-1} + exp(gamma_log) * B x_t
        y_t = Re(C h_t) + D * x_t

    lambda = exp(-exp(nu_log) + i exp(theta_log)), so |lambda| < 1. At the start lambda is uniform
    on the ring r_min <= |lambda| <= r_max with phase in [0, max_phase], exp(gamma_log) = sqrt(1 -
    |lambda|^2), B ~ N(0, 1/(2D)) and C ~ N(0, 1/K) in each of the real and imaginary parts, D ~
    N(0, 1). There is no nonlinearity in it: the channel mixer is that. The state is h_BK.

    Attributes:
      d_state: K, the number of complex states; None is d_model.
      r_min, r_max, max_phase: the ring and the phases in which lambda starts.
    """

    d_state: int | None = None
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.28

    def _states(self) -> int:
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(
                f"lru: needs 0 <= r_min < r_max <= 1; got r_min {self.r_min}, r_max {self.r_max}"
            )
        return self.d_state or self.d_model

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        D, K = self.d_model, self._states()
        nu_log_K = layers.gate_parameter(self, "nu_log", self._nu_log_init, (K,))
        theta_log_K = layers.gate_parameter(self, "theta_log", self._theta_log_init, (K,))
        lambda_K = jnp.exp(jax.lax.complex(-jnp.exp(nu_log_K), jnp.exp(theta_log_K)))

        def gamma_log_init(key, shape, dtype):
            del key, dtype
            # 1 - |lambda|^2, |lambda|^2 = exp(-2 exp(nu_log)).
            return 0.5 * jnp.log(-jnp.expm1(-2.0 * jnp.exp(nu_log_K))).reshape(shape)

        gamma_log_K = layers.gate_parameter(self, "gamma_log", gamma_log_init, (K,))
        # B x, then the recurrence.
        normal_B = nn.initializers.normal((2 * D) ** -0.5)
        Bx_BTK = jax.lax.complex(
            self.project(x_BTD, K, "B_re", kernel_init=normal_B).astype(jnp.float32),
            self.project(x_BTD, K, "B_im", kernel_init=normal_B).astype(jnp.float32),
        )
        h_BTK, h_BK = diagonal_scan(
            jnp.exp(gamma_log_K)[None, None] * Bx_BTK,
            jnp.broadcast_to(lambda_K[None, None], Bx_BTK.shape),
            initial_state=state,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        out = {"axes": ("heads", "embed"), "kernel_init": nn.initializers.normal(K**-0.5)}
        y_BTD = self.project(h_BTK.real, D, "C_re", **out)
        y_BTD = y_BTD - self.project(h_BTK.imag, D, "C_im", **out)
        skip_init = layers.undecayed(nn.initializers.normal(1.0), ("embed",))
        D_D = self.param("D", skip_init, (D,), jnp.float32)
        return (y_BTD + x_BTD * D_D[None, None]).astype(self.dtype), h_BK

    def _nu_log_init(self, key, shape, dtype=jnp.float32):
        # |lambda|^2 is uniform, hence lambda over the ring's area; u > 0 keeps the log finite.
        u = jax.random.uniform(key, shape, dtype, minval=1e-6, maxval=1.0)
        return jnp.log(-0.5 * jnp.log(u * (self.r_max**2 - self.r_min**2) + self.r_min**2))

    def _theta_log_init(self, key, shape, dtype=jnp.float32):
        return jnp.log(self.max_phase * jax.random.uniform(key, shape, dtype, minval=1e-6))

    def init_state(self, batch):
        return jnp.zeros((batch, self._states()), jnp.complex64)
