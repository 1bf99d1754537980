"""Pictures of a benchmark, as PNG without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments.benchmarks.report import Row


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
                _band(axes, [r for r in here if r["implementation"] == name], name)
            axes.set_title(f"{operator} ({variant}), {which.replace('_', ' + ')}", fontsize=9)
            _finish(axes, "T", "µs per token")
    figure.suptitle(title, fontsize=8)
    _save(figure, path)


def generation(rows: list[Row], path: Path, title: str) -> None:
    """Draws time per generated token over the number of tokens read before, a curve per model."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == name]
        x = [row["context"] for row in here]
        low, middle, high = (
            [1e3 * row[k] for row in here] for k in ("seconds_lower", "seconds", "seconds_upper")
        )
        axes.plot(x, middle, "o-", markersize=3, label=name)
        axes.fill_between(x, low, high, alpha=0.2)
    _finish(axes, "tokens read", "ms per generated token")
    axes.set_title(title, fontsize=8)
    _save(figure, path)


def _band(axes, rows: list[Row], name: str) -> None:
    """Draws one implementation's median time per token over T, with the quartiles as a band."""
    x = [row["T"] for row in rows]
    scale = [row["token_us"] / row["seconds"] for row in rows]
    low, high = (
        [row[k] * s for row, s in zip(rows, scale)] for k in ("seconds_lower", "seconds_upper")
    )
    axes.plot(x, [row["token_us"] for row in rows], "o-", markersize=3, label=name)
    axes.fill_between(x, low, high, alpha=0.2)


def _finish(axes, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
