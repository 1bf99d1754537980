"""Diffusion: how data are noised, what a denoiser is asked for, and sampling by DDIM.

Time t goes from 0, data x_0, to 1, noise e. Noised data are x_t = a_t x_0 + s_t e.

    objective "velocity"   a_t = 1 - t, s_t = t. The model predicts v = e - x_0 (rectified flow,
                           arXiv 2209.03003, eq. 1), and x_0 = x_t - t v, e = x_t + (1 - t) v.
    objective "noise"      Step n = min(floor(1000 t), 999) of 1000; a_n^2 = prod_{m<=n} (1 - b_m),
                           s_n^2 = 1 - a_n^2. The model predicts e (DDPM, arXiv 2006.11239, eq. 14).
                           Schedules of b_n:
      "linear"             from 1e-4 to 0.02 in equal steps (DDPM, section 4)
      "cosine"             b_n = min(1 - f((n + 1)/1000) / f(n/1000), 0.999) with
                           f(u) = cos^2((u + 0.008)/1.008 * pi/2) (arXiv 2102.09672, eq. 17)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.array_typing import Array

OBJECTIVES = ("velocity", "noise")
SCHEDULES = ("linear", "cosine")
STEPS = 1000  # of the objective "noise"


@dataclasses.dataclass(frozen=True)
class Process:
    """A noising process and objective: fields `objective` and, for "noise", `schedule`."""

    objective: str = "velocity"
    schedule: str = "linear"

    def levels(self, time: Array) -> tuple[Array, Array]:
        """Returns (a_t, s_t), float32 of the shape of `time`."""
        time = jnp.asarray(time, jnp.float32)
        if self.objective == "velocity":
            return 1.0 - time, time
        kept = jnp.asarray(kept_power(self.schedule), jnp.float32)[step_of(time)]
        return jnp.sqrt(kept), jnp.sqrt(1.0 - kept)

    def noised(self, x_BTE: Array, noise_BTE: Array, time_BT: Array) -> Array:
        """Returns x_t of data x_BTE."""
        a_BT1, s_BT1 = (level[..., None] for level in self.levels(time_BT))
        return a_BT1 * x_BTE + s_BT1 * noise_BTE

    def target(self, x_BTE: Array, noise_BTE: Array) -> Array:
        """Returns what the model is to predict."""
        return noise_BTE - x_BTE if self.objective == "velocity" else noise_BTE

    def split(self, x_BTE: Array, predicted_BTE: Array, time_BT: Array) -> tuple[Array, Array]:
        """Returns estimates of (x_0, e), given x_t = x_BTE and the model's prediction."""
        a_BT1, s_BT1 = (level[..., None] for level in self.levels(time_BT))
        if self.objective == "velocity":
            return x_BTE - s_BT1 * predicted_BTE, x_BTE + a_BT1 * predicted_BTE
        return (x_BTE - s_BT1 * predicted_BTE) / a_BT1, predicted_BTE

    def embedded_time(self, time: Array) -> Array:
        """Returns the number that a model's time embedding reads, from 0 to 1000."""
        if self.objective == "velocity":
            return STEPS * jnp.asarray(time, jnp.float32)
        return step_of(time).astype(jnp.float32)

    def sampling_times(self, steps: int) -> np.ndarray:
        """Returns `steps` times at which to evaluate a model, from noise to data.

        Of the objective "noise" they are the middles of equally spaced steps, the first 999 and the
        last 0 (`steps` of 1 is 999 alone); else they are 1, ..., 1 / steps.

        Raises ValueError for fewer than one step, or more than the process has.
        """
        most = STEPS if self.objective == "noise" else None
        if steps < 1 or (most and steps > most):
            raise ValueError(
                f"steps is {steps}; it must be at least 1" + (f", and at most {most}" * bool(most))
            )
        if self.objective == "velocity":
            return np.arange(steps, 0, -1, dtype=np.float32) / steps
        chosen = np.round(np.linspace(STEPS - 1, 0, steps))
        return ((chosen + 0.5) / STEPS).astype(np.float32)


def step_of(time: Array) -> Array:
    """Returns the step n, int32, of a time in [0, 1]."""
    return jnp.clip(jnp.floor(jnp.asarray(time, jnp.float32) * STEPS), 0, STEPS - 1).astype(
        jnp.int32
    )


def betas(schedule: str) -> np.ndarray:
    """Returns b_n of all steps, (STEPS,) float64."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, STEPS)
    u = np.arange(STEPS + 1) / STEPS
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def kept_power(schedule: str) -> np.ndarray:
    """Returns a_n^2 of all steps, (STEPS,) float64."""
    return np.cumprod(1.0 - betas(schedule))


def posterior(schedule: str) -> dict[str, np.ndarray]:
    """Returns coefficients of q(x_{n-1} | x_n, x_0) per step, (STEPS,) each (DDPM, eq. 6 and 7).

    Its mean is x0 * x_0 + xn * x_n. log_small is the log of its variance
    b_n (1 - a_{n-1}^2) / (1 - a_n^2), that of step 1 in place of step 0's, which is 0; log_large is
    log b_n.
    """
    b, kept = betas(schedule), kept_power(schedule)
    before = np.append(1.0, kept[:-1])
    small = b * (1.0 - before) / (1.0 - kept)
    return {
        "x0": b * np.sqrt(before) / (1.0 - kept),
        "xn": (1.0 - before) * np.sqrt(1.0 - b) / (1.0 - kept),
        "log_small": np.log(np.append(small[1], small[1:])),
        "log_large": np.log(b),
    }


def log_variance(schedule: str, share_BTE: Array, time_BT: Array) -> Array:
    """Returns the log variance of x_{n-1} that a model predicts, by its second output `share_BTE`.

    It is u log b_n + (1 - u) log(smallest variance), with u = (share + 1) / 2
    (arXiv 2102.09672, eq. 15).
    """
    small_BT1, large_BT1 = _at(schedule, time_BT, "log_small", "log_large")
    u_BTE = (share_BTE.astype(jnp.float32) + 1.0) / 2.0
    return u_BTE * large_BT1 + (1.0 - u_BTE) * small_BT1


def variational_bound(
    schedule: str,
    x_BTE: Array,
    noised_BTE: Array,
    noise_BTE: Array,
    share_BTE: Array,
    time_BT: Array,
) -> Array:
    """Returns a step's term of the variational bound per token, (B, T), in bits per channel.

    It is KL(q(x_{n-1} | x_n, x_0) || p(x_{n-1} | x_n)), and at step 0 -log p(x_0 | x_1) of a
    Gaussian density (DDPM, eq. 5). The predicted noise is held constant, so that the term trains
    the variance alone (arXiv 2102.09672, section 3.1).

    x_BTE, noised_BTE: x_0 and x_n. noise_BTE, share_BTE: a model's two outputs.
    """
    time_BT = jnp.broadcast_to(time_BT, x_BTE.shape[:2])
    noise_BTE = jax.lax.stop_gradient(noise_BTE)
    found_BTE, _ = Process("noise", schedule).split(noised_BTE, noise_BTE, time_BT)
    x0_BT1, xn_BT1, small_BT1 = _at(schedule, time_BT, "x0", "xn", "log_small")
    mean_BTE = x0_BT1 * found_BTE + xn_BT1 * noised_BTE
    true_BTE = x0_BT1 * x_BTE + xn_BT1 * noised_BTE
    log_BTE = log_variance(schedule, share_BTE, time_BT)
    squares_BTE = jnp.square(true_BTE - mean_BTE) * jnp.exp(-log_BTE)
    ratio_BTE = jnp.exp(small_BT1 - log_BTE)
    kl_BTE = 0.5 * (log_BTE - small_BT1 + ratio_BTE + squares_BTE - 1.0)
    first_BTE = 0.5 * (jnp.log(2 * jnp.pi) + log_BTE)
    first_BTE += 0.5 * jnp.square(x_BTE - mean_BTE) * jnp.exp(-log_BTE)
    bound_BTE = jnp.where((step_of(time_BT) == 0)[..., None], first_BTE, kl_BTE)
    return jnp.mean(bound_BTE, axis=-1) / np.log(2.0)


def _at(schedule: str, time_BT: Array, *names: str) -> tuple[Array, ...]:
    table, step_BT = posterior(schedule), step_of(time_BT)
    return tuple(jnp.asarray(table[name], jnp.float32)[step_BT][..., None] for name in names)


def ddim(
    process: Process,
    predict: Callable[[Array, Array], Array],
    noise_BTE: Array,
    steps: int = 50,
    largest: float | None = None,
) -> Array:
    """Returns samples made from noise, without further noise (DDIM, arXiv 2010.02502, eq. 12).

    From time t to the next smaller one s, x_s = a_s x_0 + s_s e, with the model's estimates of x_0
    and e at time t; the last step returns x_0. For the objective "velocity" it is Euler's method.

    predict: (x_t, t as a scalar) -> the model's prediction.
    largest: limits the estimates of x_0 to [-largest, largest]; e is then what is left of x_t.
    """
    times = jnp.asarray(process.sampling_times(steps))
    following = jnp.append(times[1:], jnp.zeros((), jnp.float32))

    def step(x_BTE, pair):
        time, after = pair
        time_11 = jnp.full((1, 1), time)
        x0_BTE, noise_BTE = process.split(x_BTE, predict(x_BTE, time), time_11)
        if largest is not None:
            a_111, s_111 = (level[..., None] for level in process.levels(time_11))
            x0_BTE = jnp.clip(x0_BTE, -largest, largest)
            noise_BTE = (x_BTE - a_111 * x0_BTE) / s_111
        a, s = process.levels(after)
        last = after == 0.0
        a, s = jnp.where(last, 1.0, a), jnp.where(last, 0.0, s)
        return a * x0_BTE + s * noise_BTE, None

    return jax.lax.scan(step, noise_BTE.astype(jnp.float32), (times, following))[0]
