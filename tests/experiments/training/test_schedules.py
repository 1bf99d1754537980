import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.training import schedules

STEPS, WARMUP, PEAK = 100, 10, 0.5


def config(name, **fields):
    defaults = {"final_fraction": 0.1, "decay_fraction": 0.2, "power_a": 4.0, "power_b": -0.51}
    return ConfigDict({"name": name, "warmup_steps": WARMUP, **defaults, **fields})


# After the warmup s = (n - 10) / 90: n = 10, 55 and 100 are its start, middle and end.
@pytest.mark.parametrize(
    "name, start, middle, end",
    [
        ("constant", 1, 1, 1),
        ("linear", 1, 0.55, 0.1),
        ("warmup_cosine", 1, 0.55, 0.1),
        ("wsd", 1, 1, 0.1),
        ("rex", 1, 0.1 + 0.9 * 0.5 / 0.75, 0.1),
    ],
)
def test_values_at_the_key_points(name, start, middle, end):
    schedule = jax.jit(jax.vmap(schedules.make_schedule(config(name), PEAK, STEPS)))
    values = schedule(np.array([0, 4, WARMUP - 1, WARMUP, 55, STEPS]))
    expected = PEAK * np.array([0.1, 0.5, 1, start, middle, end])
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_wsd_holds_until_its_last_fifth_and_then_falls_linearly():
    schedule = schedules.make_schedule(config("wsd"), PEAK, STEPS)
    np.testing.assert_allclose(schedule(79), PEAK, rtol=1e-6)
    np.testing.assert_allclose(schedule(90), PEAK * 0.55, rtol=1e-5)


def test_power_follows_equations_7_and_8():
    batch_size, length, lr_max = 64, 4096, 0.12
    fields = config("power", final_fraction=0.0)
    schedule = schedules.make_schedule(fields, lr_max, STEPS, batch_size, length)

    def eta(steps_seen):
        return min(lr_max, batch_size * 4.0 * (steps_seen * batch_size * length) ** -0.51)

    assert eta(40) < eta(WARMUP) == lr_max
    np.testing.assert_allclose(schedule(4), 0.5 * eta(WARMUP), rtol=1e-5)
    np.testing.assert_allclose(schedule(39), eta(40), rtol=1e-5)
    np.testing.assert_allclose(schedule(90), 0.5 * eta(81), rtol=1e-5)
    np.testing.assert_allclose(schedule(STEPS), 0.0, atol=1e-9)
    # Twice the batch with half the steps: the same rate at the same number of tokens, twice over.
    larger = schedules.make_schedule(fields, 1e9, STEPS, 2 * batch_size, length)
    smaller = schedules.make_schedule(fields, 1e9, STEPS, batch_size, length)
    np.testing.assert_allclose(larger(24), 2 * smaller(49), rtol=1e-5)


def test_no_warmup_starts_at_the_peak():
    schedule = schedules.make_schedule(config("linear", warmup_steps=0), PEAK, STEPS)
    np.testing.assert_allclose(schedule(0), PEAK)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="cosine.*choose one of constant, linear"):
        schedules.make_schedule(config("cosine"), PEAK, STEPS)
    with pytest.raises(ValueError, match="warmup_steps is 10.*train.steps = 5"):
        schedules.make_schedule(config("wsd"), PEAK, 5)
