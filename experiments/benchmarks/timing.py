"""Times programs round-robin, so that disturbances affect all alike and ratios hold where absolute
times do not."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

MIN_ROUNDS = 3


class Timing(NamedTuple):
    """Result of timing one call: median and quartiles of seconds per call, and number of rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    def row(self, calls: int = 1) -> dict[str, float]:
        """Returns the fields of a report's row; calls: how many the program stands for."""
        lower, upper = self.lower / calls, self.upper / calls
        seconds = {"seconds": self.median / calls, "seconds_lower": lower, "seconds_upper": upper}
        return seconds | {"rounds": self.rounds}


def interleaved(
    calls: Mapping[Hashable, Callable[[], Any]],
    rounds: int,
    seconds: float,
    block_seconds: float = 0.02,
    together: Callable[[Hashable], Hashable] = lambda key: key,
) -> dict[Hashable, Timing]:
    """Times several calls side by side, each once per round after warming up.

    The order is drawn anew for each round, from a fixed seed, so that no call always follows the
    one that left the caches at their worst. Returns each call's Timing by its key.

    rounds: the number of rounds, at least MIN_ROUNDS.
    seconds: the time budget of a call. One that has used it up is left out after MIN_ROUNDS rounds,
      and one that has used four times as much is left out at once.
    block_seconds: a shorter call is repeated until one measurement lasts this long; with 0, each
      call is made at most 3 + rounds times.
    together: function from a key to its group. Calls of a group follow each other in a round, so
      that what one leaves behind, such as memory to be allocated again, slows one call of another
      group, not half of them.
    """
    repeats = {key: _repeats(call, block_seconds) for key, call in calls.items()}
    samples = {key: [] for key in calls}
    keys = list(calls)
    rng = np.random.default_rng(0)
    for _ in range(max(rounds, MIN_ROUNDS)):
        drawn = [keys[i] for i in rng.permutation(len(keys))]
        groups = list(dict.fromkeys(map(together, drawn)))
        for key in sorted(drawn, key=lambda key: groups.index(together(key))):
            spent = sum(samples[key]) * repeats[key]
            if spent > (seconds if len(samples[key]) >= MIN_ROUNDS else 4 * seconds):
                continue
            samples[key].append(_seconds_a_call(calls[key], repeats[key]))
    return {key: summary(x) for key, x in samples.items()}


def summary(samples: list[float]) -> Timing:
    lower, median, upper = np.percentile(samples, (25, 50, 75))
    return Timing(float(median), float(lower), float(upper), len(samples))


def _repeats(call, block_seconds: float) -> int:
    """Warms a call up, at most three times; returns how often one measurement repeats it."""
    start = time.perf_counter()
    for _ in range(3):
        once = _seconds_a_call(call, 1)
        if time.perf_counter() - start > block_seconds:
            break
    return max(1, int(block_seconds / max(once, 1e-9)))


def _seconds_a_call(call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
