"""What a claim is: a paper's statement, what is measured in its place, and when it holds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Measured = dict[str, Any]  # what JSON can hold; lists over seeds where a claim is statistical


class Check(NamedTuple):
    """One statement that is true or false of the measurements.

    text: what the paper says, in one sentence. measured: the figures it is judged by.
    tolerance: when it holds, as in "every seed, by at least 0.01".
    """

    text: str
    holds: bool
    measured: str
    tolerance: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim and its reproduction.

    title: the claim in one sentence, which is also the picture's title.
    paper, section: as in "arXiv 2411.12537" and "table 3".
    published: what the paper reports, its numbers quoted.
    ours: what is trained and measured here in its place.
    run: context -> measurements that JSON can hold. It trains by `context.train`, and measures
      `context.seeds` where the claim is statistical.
    judge: measurements -> checks. The claim holds if all of them do. It must run on a smoke run's
      measurements too, whose verdict nobody reads.
    draw: (measurements, figure) -> None; draws on a matplotlib figure with constrained layout: axes
      labelled with units, the paper's numbers marked where they fit, the legend outside.
    seeds: number of seeds. minutes: of processor time from scratch, at most 15.
    tried: of a claim that fails here, what was tried.
    figure_size: width and height of the picture in inches.
    """

    title: str
    paper: str
    section: str
    published: str
    ours: str
    run: Callable[[Any], Measured]
    judge: Callable[[Measured], list[Check]]
    draw: Callable[[Measured, Any], None]
    seeds: int = 1
    minutes: float = 5.0
    tried: str = ""
    figure_size: tuple[float, float] = (8.0, 4.5)


Values = float | Sequence[float]


def less(text: str, small: Values, large: Values, margin: float = 0.0, every_seed=True) -> Check:
    """Returns the check that `small` + margin < `large`, which are numbers or a number per seed.

    every_seed: whether it must hold seed by seed; else of the means over seeds.
    """
    low, high = np.atleast_1d(small), np.atleast_1d(large)
    if every_seed and low.shape != high.shape:
        raise ValueError(f"{text}: {low.size} and {high.size} seeds; give as many of both")
    holds = (low + margin < high).all() if every_seed else low.mean() + margin < high.mean()
    by = f"by more than {margin:g}" if margin else "less"
    many = max(low.size, high.size) > 1
    of = ("in every seed, " if every_seed else "mean over seeds, ") if many else ""
    return Check(text, bool(holds), f"{shown(small)} < {shown(large)}", of + by)


def at_least(text: str, values: Values, least: float) -> Check:
    """Returns the check that a number, or each seed's, is at least `least`."""
    holds = (np.atleast_1d(values) >= least).all()
    return Check(text, bool(holds), shown(values), f"at least {least:g}")


def at_most(text: str, values: Values, most: float) -> Check:
    """Returns the check that a number, or each seed's, is at most `most`."""
    holds = (np.atleast_1d(values) <= most).all()
    return Check(text, bool(holds), shown(values), f"at most {most:g}")


def shown(values: Values) -> str:
    """Returns a number, or a mean over seeds with the least and the largest, as text."""
    values = np.atleast_1d(values)
    if values.size == 1:
        return f"{values[0]:.4g}"
    return f"{values.mean():.4g} ({values.min():.4g} to {values.max():.4g})"
