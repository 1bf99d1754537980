"""Pieces of the claims' pictures: bars with seeds and the paper's number, curves, the legend."""

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure

from experiments.claims.claim import Values

PAPER = {"marker": "D", "color": "black", "markerfacecolor": "white", "linestyle": "none"}


def bars(axes, values: Mapping[str, Values], unit: str, paper: Mapping[str, float] | None = None):
    """Draws a horizontal bar per name, the mean over seeds, with a dot per seed.

    unit: what the axis measures. paper: the paper's numbers, a diamond on the bars of their names.
    """
    paper = paper or {}
    for place, seeds in enumerate(map(np.atleast_1d, values.values())):
        axes.barh(place, seeds.mean(), color=f"C{place % 10}", alpha=0.6)
        if seeds.size > 1:
            label = None if place else "one seed"
            axes.plot(seeds, np.full(seeds.shape, place), "k.", markersize=5, label=label)
    if known := [(paper[name], place) for place, name in enumerate(values) if name in paper]:
        axes.plot(*zip(*known), **PAPER, label="paper")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3, axis="x")


def curves(
    axes, lines: Mapping[str, Sequence[tuple[float, Values]]], x: str, y: str, **style
) -> None:
    """Draws a curve per name through points (x, value or a value per seed), seeds as a band.

    x, y: what the axes measure, with units. style: of matplotlib's plot.
    """
    for number, (name, points) in enumerate(lines.items()):
        at, seeds = zip(*[(place, np.atleast_1d(values)) for place, values in points])
        color = f"C{number % 10}"
        axes.plot(
            at, [s.mean() for s in seeds], "o-", **{"markersize": 3, "color": color} | style,
            label=name,
        )  # fmt: skip
        least, most = [s.min() for s in seeds], [s.max() for s in seeds]
        axes.fill_between(at, least, most, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def legend(figure: Figure) -> None:
    """Draws one legend of all axes' labels outside of them, on the right."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=9)
