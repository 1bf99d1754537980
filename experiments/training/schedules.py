"""Learning-rate schedules by name: functions step -> learning rate, usable under jit.

n is the number of the update, from 0; N the updates of the run (`train.steps`); W `warmup_steps`;
lr0 `learning_rate`; m `final_fraction`; s = (n - W) / (N - W), in [0, 1]. The formulas below hold
from W on. Before it they are multiplied by (n + 1) / W: the first update does not have rate 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[int | jax.Array], jax.Array]


def constant(s, config, steps):
    """The constant schedule: lr0."""
    return jnp.ones_like(s)


def linear(s, config, steps):
    """Linear decay: lr0 (1 - (1 - m) s). With m = 0, "straight to zero" of arXiv 2502.15938."""
    return 1 - (1 - config.final_fraction) * s


def warmup_cosine(s, config, steps):
    """Cosine decay: lr0 (m + (1 - m) (1 + cos(pi s)) / 2) (SGDR, arXiv 1608.03983, eq. 5)."""
    m = config.final_fraction
    return m + (1 - m) * 0.5 * (1 + jnp.cos(jnp.pi * s))


def wsd(s, config, steps):
    """Warmup-stable-decay (MiniCPM, arXiv 2404.06395, section 4.2).

    lr0 until the last `decay_fraction` of the N updates, then down to m lr0 linearly in n, which
    arXiv 2405.18392 found no worse than an exponential.
    """
    n = config.warmup_steps + s * (steps - config.warmup_steps)
    return 1 - (1 - config.final_fraction) * _final_decay(n, config, steps)


def rex(s, config, steps):
    """REX: lr0 (m + (1 - m) (1 - s) / (1/2 + (1 - s) / 2)) (arXiv 2107.04197, section 4)."""
    m = config.final_fraction
    return m + (1 - m) * (1 - s) / (0.5 + 0.5 * (1 - s))


_SHAPES = {f.__name__: f for f in (constant, linear, warmup_cosine, wsd, rex)}


def names() -> list[str]:
    """Returns the names of all schedules."""
    return sorted([*_SHAPES, "power"])


def power(config, learning_rate: float, steps: int, batch_size: int, length: int) -> Schedule:
    """The Power schedule, agnostic of batch size and length of training (arXiv 2408.13359).

    With B sequences in a batch and t tokens seen so far (eqs. 7 and 8),

      eta(t) = min(lr0, B a t^b)
      lr     = (t / t_W) eta(t_W)     in the warmup
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
    """Returns the schedule `config.name` of a run of `steps` updates.

    config: the fields name, warmup_steps, final_fraction; of wsd and power decay_fraction; of power
      power_a, power_b.
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
    """Returns 0 until the last `decay_fraction` of the updates, then a linear rise to 1."""
    decay_steps = max(config.decay_fraction * steps, 1)
    return jnp.minimum(jnp.maximum(n - (steps - decay_steps), 0.0) / decay_steps, 1.0)
