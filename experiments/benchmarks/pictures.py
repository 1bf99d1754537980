"""Pictures of a benchmark, as PNG without a display."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

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


def lengths(rows: list[Row], stream: list[Row], path: Path, title: str) -> None:
    """Draws time and planned memory of operators over T, and what a stream of blocks holds.

    Grey lines have the slopes of T and T^2. rows, stream: as `benchmarks.lengths` returns them.
    """
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    whats = (
        ("forward", "seconds", 1e3, "median time, ms", "Forward"),
        ("forward_backward", "seconds", 1e3, "median time, ms", "Forward and backward"),
        (
            "forward_backward",
            "temp_bytes",
            2**-20,
            "temporary memory, MiB (compiled)",
            "Memory of forward and backward beside inputs and outputs",
        ),
    )
    for axes, (which, key, scale, label, heading) in zip(panels.flat, whats):
        ends = []
        for i, name in enumerate(dict.fromkeys(row["operator"] for row in rows)):
            here = [row for row in rows if (row["operator"], row["pass"]) == (name, which)]
            here = [row for row in here if row.get(key) is not None]
            if not here:
                continue
            x, y = [row["T"] for row in here], [row[key] * scale for row in here]
            axes.plot(x, y, "o-", color=f"C{i}", markersize=4, label=name)
            linear = i == 0 or (key == "temp_bytes" and i == 1)
            ends.append((x, y, 1 if linear else 2))
        for x, y, power in ends:
            # An ideal slope through the last point, over the last quarter of the lengths.
            last = np.array(x[-(len(x) // 2 + 1) :], float)
            ideal = y[-1] * (last / last[-1]) ** power
            linestyle = ":" if power == 1 else "--"
            name = f"slope of T{'' if power == 1 else '²'}"
            axes.plot(last, ideal, linestyle, color="0.45", zorder=0, label=name)
        _log_axes(axes, "tokens T", label, heading)
    axes = panels[1, 1]
    x = [row["blocks"] for row in stream]
    for name, key, style in (
        ("state of block-causal linear attention", "state_bytes", "C0s-"),
        ("keys and values of softmax attention", "keys_and_values_bytes", "C1s-"),
    ):
        axes.plot(x, [row[key] / 2**10 for row in stream], style, markersize=3, label=name)
    size = stream[0]["tokens"]
    _log_axes(axes, f"blocks of {size} tokens read", "held, KiB", "Held while blocks are read")
    found = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    found = dict(sorted(found.items(), key=lambda item: item[0].startswith("slope")))
    figure.legend(found.values(), found, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"Whole-document linear attention and softmax attention\n{title}", fontsize=10)
    plots.save(figure, path, dpi=110)


def _log_axes(axes, x: str, y: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="major")


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
