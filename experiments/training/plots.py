"""Draws curves of a run (loss, accuracy, cost) as PNG files, without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np


def loss_curve(
    rows: list[dict], path: Path, unit: str = "nats per token", scale: float = 1.0, baselines=None
) -> None:
    """Draws training loss (also smoothed) and validation loss over steps, into a PNG.

    rows: dicts of metrics.jsonl, with "step" and "loss" or "validation_loss" in nats per token.
    unit, scale: the unit on the y axis, and the factor from nats to it.
    baselines: name -> value in `unit`, drawn as horizontal lines.
    """
    train = np.array([(r["step"], r["loss"]) for r in rows if "loss" in r]).reshape(-1, 2)
    held_out = np.array([(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r])
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(train[:, 0], scale * train[:, 1], color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(train[:, 0], scale * _smooth(train[:, 1]), color="C0", label="training, smoothed")
    if len(held_out):
        axes.plot(*(held_out * [1, scale]).T, "o-", color="C1", markersize=3, label="validation")
    for i, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(
            value, color=f"C{i + 2}", linestyle="--", linewidth=1, label=f"{name} {value:.2f}"
        )
    axes.set(xlabel="step", ylabel=f"loss, {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def bucket_curve(table: list[dict], x: str, path: Path) -> None:
    """Draws loss and accuracy over the ranges of a `bucket_table`; `x` is the x axis' label."""
    middle = [(row["first"] + row["last"]) / 2 for row in table]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(middle, [row["loss"] for row in table], "o-", label="loss, nats per token")
    axes.plot(middle, [row["accuracy"] for row in table], "s-", label="accuracy")
    axes.set(xlabel=x, ylim=(0, None))
    if middle[-1] > 20 * max(middle[0], 1):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def loss_by_position(tables: dict[str, list[dict]], path: Path) -> None:
    """Draws loss by position in a document, a curve per entry (label -> rows) of `tables`."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, table in tables.items():
        middle = [(row["first"] + row["last"]) / 2 for row in table]
        axes.plot(middle, [row["loss"] for row in table], "o-", markersize=3, label=name)
    axes.set(xlabel="tokens before the prediction", ylabel="loss, nats per token")
    axes.set_xscale("symlog", linthresh=16)
    axes.grid(alpha=0.3)
    axes.legend(title="context")
    save(figure, path)


def _smooth(y):
    """Returns the running mean of a curve, over a centred window of a thirtieth of its length."""
    half = max(len(y) // 60, 1)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - half, 0)
    last = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[last] - sums[first]) / (last - first)


def save(figure, path: Path, dpi: int = 130) -> None:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def lines(panels: dict[str, dict[str, list[tuple]]], x: str, path: Path) -> None:
    """Draws panels (y label -> curve's name -> points (x, y)) side by side, with log axes."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.6, 3.8), layout="constrained"
    )
    for axis, (y, points) in zip(np.atleast_1d(axes), panels.items()):
        for name, line in points.items():
            axis.plot(*zip(*line), "o-", markersize=3, label=name)
        axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    save(figure, path)
