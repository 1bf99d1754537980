"""Pictures of a benchmark, as PNG without a display."""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.benchmarks.report import Row
from experiments.training import plots


def time_per_token(rows: list[Row], path: Path, title: str) -> None:
    """Draws time per token over T by implementation, a panel per operator, variant and pass."""
    rows = [row for row in rows if "seconds" in row]
    cases = list(dict.fromkeys((row["operator"], row["variant"]) for row in rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    size = (4.6 * len(passes) + 0.4, 3.0 * len(cases) + 0.6)
    figure, panels = plt.subplots(
        len(cases), len(passes), figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    for line, (operator, variant) in zip(panels, cases):
        for axes, which in zip(line, passes):
            here = [
                r
                for r in rows
                if (r["operator"], r["variant"], r["pass"]) == (operator, variant, which)
            ]
            for name in dict.fromkeys(r["implementation"] for r in here):
                found = [r for r in here if r["implementation"] == name]
                scales = [r["token_us"] / r["seconds"] for r in found]
                _band(axes, [r["T"] for r in found], found, scales, name)
            axes.set_title(f"{operator} ({variant}), {which.replace('_', ' + ')}", fontsize=9)
            _finish(axes, "T", "µs per token")
    figure.suptitle(title, fontsize=8)
    plots.save(figure, path, dpi=110)


def generation(rows: list[Row], path: Path, title: str) -> None:
    """Draws time per generated token over the number of tokens read before, a curve per model."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == name]
        _band(axes, [row["context"] for row in here], here, [1e3] * len(here), name)
    _finish(axes, "tokens read", "ms per generated token")
    axes.set_title(title, fontsize=8)
    plots.save(figure, path, dpi=110)


def _band(axes, x: list[int], rows: list[Row], scales: list[float], name: str) -> None:
    """Draws one implementation's median time per token over T, with the quartiles as a band."""
    low, middle, high = (
        [row[k] * scale for row, scale in zip(rows, scales)]
        for k in ("seconds_lower", "seconds", "seconds_upper")
    )
    axes.plot(x, middle, "o-", markersize=3, label=name)
    axes.fill_between(x, low, high, alpha=0.2)


def _finish(axes, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
