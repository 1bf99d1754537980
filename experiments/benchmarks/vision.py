"""Trains one encoder per mixer on the digits, with one budget, into a table of accuracies.

Each run is that of configs/digits.py:<mixer>. Its scores are kept as soon as it ends, so that a
bench which was stopped goes on, and a mixer that failed stands in the table with the reason.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from configs import digits
from experiments.benchmarks import machine, report
from experiments.benchmarks.report import Row
from experiments.data import make_dataset
from experiments.training import loop, metrics, plots, run_record
from seqmodels import mixers

FOLDER = Path(__file__).resolve().parents[1] / "reports" / "digits"
SOFTMAX, MLP, _ = digits.BASELINES


def kind(name: str) -> str:
    """Returns "baseline", "non-causal" or "causal, both ways", what a mixer of the table is."""
    if name in digits.BASELINES:
        return "baseline"
    return "causal, both ways" if mixers.mixer_class(name).causal else "non-causal"


def run(
    names: Sequence[str],
    seeds: int,
    settings: Row,
    folder: Path = FOLDER,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Trains what is missing of each mixer with seeds 0 to seeds - 1; returns the table's rows.

    settings: "argument" and "steps" of every run: configs/digits.py:<mixer>,<argument>, steps 0 for
      the config's.
    folder: result.json, tables.md and accuracy.png are read and written there. Raises ValueError if
      it holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = _read(folder, settings)
    for seed in range(seeds):
        for name in names:
            if any((found["mixer"], found["seed"]) == (name, seed) for found in runs):
                continue
            found = {"mixer": name, "seed": seed} | _trained(name, seed, settings)
            runs.append(found)
            outcome = found.get("failed") or f"accuracy {found['accuracy']:.4f}"
            log(f"{name}, seed {seed}: {outcome}")
            save(folder, settings, runs)
    return table(runs)


def _read(folder: Path, settings: Row) -> list[Row]:
    """Returns the runs that a folder's result.json holds. Raises ValueError for other settings."""
    path = folder / "result.json"
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["settings"] != settings:
        raise ValueError(
            f"{path} is of {kept['settings']}, and {settings} is asked for: give another --out, or "
            "remove it"
        )
    return [found for found in kept["runs"] if "failed" not in found]  # those are tried again


def _trained(name: str, seed: int, settings: Row) -> Row:
    """Returns the scores of one run, or {"failed": why} of a mixer that cannot be trained."""
    arguments = ",".join(filter(None, [name, str(settings["argument"])]))
    config = digits.get_config(arguments)
    config.seed = config.data.seed = seed
    if settings["steps"]:
        config.train.steps = settings["steps"]
        config.schedule.warmup_steps = min(config.schedule.warmup_steps, config.train.steps // 4)
    config.train.log_every = max(1, config.train.steps // 5)
    config.train.eval_every = config.checkpoint.every = config.train.steps + 1
    with tempfile.TemporaryDirectory() as workdir:
        try:
            result = loop.train(config, workdir)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            return {"failed": str(error).split("\n")[0][:200]}
        speeds = [
            row["tokens_per_second"]
            for row in metrics.read_metrics(Path(workdir))
            if "tokens_per_second" in row
        ]
    shape = next(iter(make_dataset(config.data, "train")))["labels"].shape
    return {
        "pattern": config.model.pattern,
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "parameters": result["parameters"],
        "step_seconds": math.prod(shape) / statistics.median(speeds) if speeds else None,
    }


def table(runs: Sequence[Row]) -> list[Row]:
    """Returns a row per mixer, with means over seeds: baselines first, then by accuracy."""
    rows = []
    for name in dict.fromkeys(str(found["mixer"]) for found in runs):
        mine = [found for found in runs if found["mixer"] == name]
        good: list[Any] = [found for found in mine if "failed" not in found]

        def mean(key, good=good):
            values = [found[key] for found in good if found[key] is not None]
            return statistics.mean(values) if values else None

        accuracies = [100 * found["accuracy"] for found in good]
        rows.append(
            {
                "mixer": name,
                "kind": kind(name),
                "accuracy %": f"{statistics.mean(accuracies):.1f}" if good else "-",
                "range": f"{min(accuracies):.1f} to {max(accuracies):.1f}" if good else "-",
                "seeds": len(good),
                "loss": mean("loss"),
                "parameters": good[0]["parameters"] if good else None,
                "ms per step": mean("step_seconds") and 1e3 * mean("step_seconds"),
                "note": next((str(x["failed"]) for x in mine if "failed" in x), ""),
            }
        )
    rows.sort(key=lambda row: (row["kind"] != "baseline", -_number(row["accuracy %"])))
    return rows


def _number(text: str) -> float:
    return -1.0 if text == "-" else float(text)


def save(folder: Path, settings: Row, runs: Sequence[Row]) -> None:
    """Writes result.json, tables.md and accuracy.png."""
    environment = machine.environment()
    result = {"environment": environment, "settings": settings, "runs": runs}
    run_record.write_json(folder / "result.json", result)
    rows, steps = table(runs), settings["steps"] or "the config's"
    text = [
        "# Digits",
        machine.describe(environment),
        "scikit-learn's digits, configs/digits.py:&lt;mixer&gt;: accuracy on the 359 test images "
        f"after {steps} steps, the same width, depth and budget for "
        "all. A causal mixer runs in both directions; `attention` is softmax over the whole image, "
        "`mlp` sees the image as one token, `pooling` each token alone before the mean. "
        f"{len(rows)} of {len(digits.names())} baselines and mixers have been trained.",
        report.markdown_table(rows),
        "![accuracy](accuracy.png)",
    ]
    run_record.write_text(folder / "tables.md", "\n\n".join(text) + "\n")
    if any(row["seeds"] for row in rows):
        picture(rows, folder / "accuracy.png")


_COLOURS = {"baseline": "0.5", "non-causal": "C0", "causal, both ways": "C1"}


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draws the accuracy of each mixer as a bar, coloured by its kind, into a PNG."""
    rows = sorted((row for row in rows if row["seeds"]), key=lambda row: _number(row["accuracy %"]))
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.24 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        value = _number(row["accuracy %"])
        low, high = map(float, str(row["range"]).split(" to "))
        spread = [[value - low], [high - value]] if row["seeds"] > 1 else None
        axes.barh(place, value, xerr=spread, color=_COLOURS[row["kind"]], ecolor="0.2")
        axes.text(value, place, f" {value:.1f}", va="center", fontsize=7)
    for name, style in ((SOFTMAX, "--"), (MLP, ":")):
        for row in rows:
            if row["mixer"] == name:
                axes.axvline(_number(row["accuracy %"]), color="0.3", linestyle=style, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["mixer"] for row in rows], fontsize=8)
    least = min(_number(row["accuracy %"]) for row in rows)
    axes.set(xlabel="test accuracy, % (dashed: softmax attention, dotted: MLP)", ylim=(-0.7, None))
    axes.set_xlim(max(0.0, least - 5), 102)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set_title("8x8 digits, one encoder per mixer, the same budget", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, _COLOURS, loc="outside lower center", ncols=3, fontsize=8)
    plots.save(figure, path)
