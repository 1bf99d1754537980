"""Builds learning-rate schedules by name: functions step -> learning rate, usable under jit.

n is the number of the update, from 0; N the updates of the run (`train.steps`); W `warmup_steps`;
lr0 `learning_rate`; m `final_fraction`; s = (n - W) / (N - W), in [0, 1]. The formulas of the
functions below hold from n = W on. In the warmup, n < W, they are multiplied by (n + 1) / W, so
that the first update's rate is not 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[int | jax.Array], jax.Array]


def constant(s, config, steps):
    """Returns lr / lr0 of the constant schedule: 1, whatever the progress s."""
    return jnp.ones_like(s)


def linear(s, config, steps):
    """Returns lr / lr0 of linear decay: 1 - (1 - m) s.

    s is progress in [0, 1], m final_fraction. m = 0 is "straight to zero" of arXiv 2502.15938.
    """
    return 1 - (1 - config.final_fraction) * s


def warmup_cosine(s, config, steps):
    """Returns lr / lr0 of cosine decay: m + (1 - m) (1 + cos(pi s)) / 2.

    s is progress in [0, 1], m final_fraction (SGDR, arXiv 1608.03983, eq. 5).
    """
    m = config.final_fraction
    return m + (1 - m) * 0.5 * (1 + jnp.cos(jnp.pi * s))


def wsd(s, config, steps):
    """Returns lr / lr0 of warmup-stable-decay (MiniCPM, arXiv 2404.06395, section 4.2).

    It is 1 until the last `decay_fraction` of the N updates, in which it falls to m =
    final_fraction linearly in n. arXiv 2405.18392 found that no worse than an exponential.
    """
    n = config.warmup_steps + s * (steps - config.warmup_steps)
    return 1 - (1 - config.final_fraction) * _final_decay(n, config, steps)


def rex(s, config, steps):
    """Returns lr / lr0 of REX: m + (1 - m) (1 - s) / (1/2 + (1 - s) / 2).

    s is progress in [0, 1], m final_fraction (arXiv 2107.04197, section 4).
    """
    m = config.final_fraction
    return m + (1 - m) * (1 - s) / (0.5 + 0.5 * (1 - s))


_SHAPES = {f.__name__: f for f in (constant, linear, warmup_cosine, wsd, rex)}


def names() -> list[str]:
    """Returns the names of all schedules."""
    return sorted([*_SHAPES, "power"])


def power(config, learning_rate: float, steps: int, batch_size: int, length: int) -> Schedule:
    """Returns the Power schedule, agnostic of batch size and length of training (arXiv 2408.13359).

    With B sequences of `length` tokens in a batch and t tokens seen so far (eqs. 7 and 8),

      eta(t) = min(lr0, B a t^b)
      lr     = (t / t_W) eta(t_W)     in the warmup, whose end is at t_W tokens
               eta(t)                 after it
               f eta(t_(N - d))       in the last d = `decay_fraction` N updates,

    where f falls linearly from 1 to m. The paper takes a = 4 (`power_a`), b = -0.51 (`power_b`) and
    lr0 = 0.02, under muP.
    """

    def schedule(step):
        n = jnp.asarray(step, jnp.float32)
        last_power_step = steps - config.decay_fraction * steps
        held = jnp.minimum(jnp.maximum(n, config.warmup_steps - 1), last_power_step)
        tokens = (held + 1) * (batch_size * length)
        eta = jnp.minimum(learning_rate, batch_size * config.power_a * tokens**config.power_b)
        f = 1 - (1 - config.final_fraction) * _final_decay(n, config, steps)
        return _warmup(n, config) * f * eta

    return schedule


def make_schedule(
    config, learning_rate: float, steps: int, batch_size: int = 1, length: int = 1
) -> Schedule:
    """Returns the learning-rate schedule `config.name` of a run of `steps` updates.

    config: the fields name, warmup_steps and final_fraction; for wsd and power also decay_fraction;
      for power also power_a and power_b.
    batch_size, length: sequences in a batch, and tokens in a sequence. Only `power` uses them.
    Raises ValueError for an unknown name, a warmup longer than the run, or a fraction out of range.
    """
    if config.name not in names():
        raise ValueError(f"unknown schedule {config.name!r}; choose one of {', '.join(names())}")
    if not 0 <= config.warmup_steps <= steps:
        raise ValueError(
            f"schedule.warmup_steps is {config.warmup_steps}; it must lie between 0 and "
            f"train.steps = {steps}"
        )
    for name in ("final_fraction", "decay_fraction"):
        if not 0 <= config[name] <= 1:
            raise ValueError(f"schedule.{name} is {config[name]}; it must lie between 0 and 1")
    if config.name == "power":
        return power(config, learning_rate, steps, batch_size, length)

    def schedule(step):
        n = jnp.asarray(step, jnp.float32)
        after_warmup = max(steps - config.warmup_steps, 1)
        s = jnp.minimum(jnp.maximum(n - config.warmup_steps, 0.0) / after_warmup, 1.0)
        return _warmup(n, config) * learning_rate * _SHAPES[config.name](s, config, steps)

    return schedule


def _warmup(n, config):
    return jnp.minimum((n + 1) / max(config.warmup_steps, 1), 1.0)


def _final_decay(n, config, steps):
    """Returns 0 for update n before the last `decay_fraction` of all, then a linear rise to 1."""
    decay_steps = max(config.decay_fraction * steps, 1)
    return jnp.minimum(jnp.maximum(n - (steps - decay_steps), 0.0) / decay_steps, 1.0)
