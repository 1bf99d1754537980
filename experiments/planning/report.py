"""Reports plans: what fits and what to change, as tables, JSON and pictures."""

import json
import math
import operator
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.benchmarks.report import markdown_table, text_table
from experiments.planning.candidates import GIB, Row
from experiments.training import plots
from seqmodels import sharding

NOTE = (
    "Compiled programs, read; nothing was run. Memory is XLA's own, of one device. FLOPs (of "
    "matrix products), HBM bytes and collectives are counted in the compiled program, loops as "
    "often as they run; XLA's own count takes a loop's body once and nothing of a Pallas kernel. "
    "Time is a model (experiments/planning/estimate.py): operations one after the other, each at "
    "peak, at HBM bandwidth or as the compiler estimates it; Pallas kernels at half of peak; "
    "collectives at 0.9 of the links' published rate, hidden only where the compiler made them "
    "asynchronous. It orders meshes, and is too low by all that stalls. MFU counts 6 FLOPs per "
    "parameter and token, without the embedding's and the recurrence's."
)


def usable_bytes(row: Row) -> int:
    """Returns the HBM bytes of a device that a plan may use: as libtpu says, if it does, or all."""
    return row.get("usable_bytes", row["hbm_bytes_a_device"])


def advice(row: Row) -> list[str]:
    """Returns what to change, cheapest first, so that a plan's step fits in HBM; [] if it fits."""
    limit = usable_bytes(row)
    if row["needed_bytes"] <= limit and "estimate" in row:
        return []
    state = sum(row["state_bytes"].values())
    free, rest = limit - state, row["needed_bytes"] - state
    mesh, ways = row["mesh"], []
    rows = row["batch_size"] // math.prod(mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
    if free > 0 and row["remat"] != "full":
        ways.append("config.model.remat=full, which recomputes layers in the backward pass")
    if free > 0 and rows > row["accumulate"]:
        times = row["accumulate"] * max(rest / free, 2)
        pieces = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= min(times, rows))
        ways.append(f"config.train.accumulate={pieces}: the same batch in smaller pieces")
    elif free > 0:
        ways.append("a larger seq axis, since a device has one row already")
    if state > limit / 2 and row["zero"] < 3 and mesh.get("data", 1) * mesh.get("seq", 1) > 1:
        ways.append(
            "more of the mesh on fsdp, or config.parallel.zero=3: the state in smaller parts"
        )
    return [*ways, "a slice of more devices, or of a part with more HBM"]


def verdict(row: Row) -> str:
    """Returns a sentence: a plan's step fits in HBM, or by how much not and what to change."""
    needed, limit = row["needed_bytes"] / GIB, usable_bytes(row) / GIB
    ways = advice(row)
    if not ways:
        return f"fits: {needed:.1f} of {limit:.0f} GiB per device"
    more = f"{needed - limit:.1f} more than a device has"
    return f"does not fit: {needed:.1f} GiB, {more}. Try {'; or '.join(ways)}"


def name(row: Row) -> str:
    """Returns a short label of a plan, for tables and axes: its mesh, and its collective if any."""
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "1 device"
    return f"{mesh} {row['collective']}" if row["collective"] else mesh


def line(row: Row) -> Row:
    """Returns a plan as a row of the table of plans: memory, FLOPs, bytes, estimated times."""
    estimate, state = row.get("estimate", {}), row["state_bytes"]
    tokens = row["batch_size"] * row["seq_len"]

    def scaled(value, by):
        return None if value is None else value / by

    return {
        "topology": row["topology"],
        "mesh": name(row),
        "batch": row["batch_size"],
        "T": row["seq_len"],
        "state GiB": sum(state.values()) / GIB,
        "needed GiB": row["needed_bytes"] / GIB,
        "of": f"{usable_bytes(row) / GIB:.0f}",
        "TFLOP": scaled(row.get("flops"), 1e12),
        "HBM GB": scaled(row.get("hbm_bytes"), 1e9),
        "received GB": scaled(received(row), 1e9),
        "step s": estimate.get("seconds"),
        "compute": estimate.get("compute_seconds"),
        "collectives": estimate.get("communication_seconds"),
        "waits": estimate.get("waiting_seconds"),
        "ns per token and device": scaled(estimate.get("seconds"), 1e-9 * tokens / row["devices"]),
        "MFU %": scaled(estimate.get("mfu"), 0.01),
        "": "fits" if not advice(row) else "DOES NOT FIT",
    }


def rank(row: Row) -> tuple:
    """Returns a sort key of a plan: those that fit in HBM first, then most tokens per second."""
    return bool(advice(row)), -row.get("estimate", {}).get("tokens_per_second", 0.0)


def received(row: Row) -> float | None:
    """Returns the bytes that a device receives from others in a step; None if not compiled."""
    if "collectives" not in row:
        return None
    return sum(c["bytes received"] for c in row["collectives"])


def collective_lines(row: Row) -> list[Row]:
    return [
        {
            "kind": c["kind"],
            "axes": c["axes"],
            "devices": c["devices"],
            "times a step": c["times a step"],
            "MB received": c["bytes received"] / 1e6,
            "ms": 1e3 * c["seconds"],
        }
        for c in row.get("collectives", [])
    ]


def text(row: Row) -> str:
    """Returns a plan as text for the terminal: memory, FLOPs, collectives, step time, verdict."""
    memory, estimate = row["state_bytes"] | row.get("memory", {}), row.get("estimate")
    sizes = [f"{what} {size / GIB:.2f}" for what, size in memory.items() if size is not None]
    parts = [
        f"{_title(row)}: {row['parameters']:,} parameters. "
        f"Compiled in {row['compile_seconds']:.0f} s "
        f"({row['compile_cpu_seconds']:.0f} s of processor time).",
        f"GiB per device: {', '.join(sizes)}",
    ]
    if estimate:
        once, xla, tera = row["loops_once"], row["xla"], 1e12
        cycles = estimate["compiler_seconds"]
        parts += [
            f"TFLOP per device and step: {row['flops'] / tera:.2f}, of which in Pallas kernels "
            f"{row['kernel_flops'] / tera:.2f} (loops once, without kernels: "
            f"{once['flops'] / tera:.2f}; XLA, with element by element: "
            f"{xla['flops'] / tera:.2f}). HBM GB: {row['hbm_bytes'] / 1e9:.1f} "
            f"(loops once: {once['bytes'] / 1e9:.1f}; XLA: {xla['bytes'] / 1e9:.1f}).",
            text_table(collective_lines(row)) if row["collectives"] else "no collectives",
            f"step {estimate['seconds']:.3g} s: {estimate['compute_seconds']:.3g} s of operations, "
            f"{estimate['communication_seconds']:.3g} s of collectives, "
            f"{estimate['waiting_seconds']:.3g} s of them waited for; "
            f"not under {estimate['floor_seconds']:.3g} s. "
            f"{estimate['tokens_per_second']:,.0f} tokens per second, "
            f"MFU {100 * estimate['mfu']:.0f}%."
            + (
                f" The compiler's own cycles for operations outside kernels: {cycles:.3g} s."
                if cycles
                else ""
            ),
        ]
        if row["loops_counted_once"]:
            loops = ", ".join(row["loops_counted_once"])
            parts.append(f"Too low: the program does not say how often these loops run: {loops}.")
    return "\n".join([*parts, verdict(row)])


def _title(row: Row) -> str:
    devices = f"{row['topology']} ({row['devices']} devices)"
    return f"{devices}, {name(row)}, batch {row['batch_size']} x {row['seq_len']}"


def save(folder: Path, command: str, new: list[Row], left_out: list[str]) -> None:
    """Saves plans in the folder's plan.json, where each replaces an older one of its candidate.

    Writes all saved plans as tables.md, memory.png and, if they differ in devices, scaling.png.
    command: the one that made the new plans. left_out: a line per candidate that was not compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    old = json.loads(path.read_text())["plans"] if path.exists() else []
    # Plans of older versions call the collective an exchange.
    old = [{{"exchange": "collective"}.get(k, k): v for k, v in row.items()} for row in old]
    kept = {_key(row): row for row in old} | {_key(row): row | {"command": command} for row in new}
    size = operator.itemgetter("devices", "seq_len", "batch_size")
    rows = sorted(kept.values(), key=lambda row: (*size(row), _key(row)))
    path.write_text(json.dumps({"plans": rows, "left_out": left_out}, indent=1) + "\n")
    parts = ["# Plan", NOTE, markdown_table([line(row) for row in rows])]
    parts += ["Not compiled:\n\n" + "\n".join(f"- {why}" for why in left_out)] if left_out else []
    for row in rows:
        parts += [f"## {_title(row)}", f"`{row['command']}`", f"```\n{text(row)}\n```"]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")
    memory_bars(rows, folder / "memory.png")
    if len({row["devices"] for row in rows if "estimate" in row}) > 1:
        scaling(rows, folder / "scaling.png")


_SAME_IN = (
    "devices", "topology", "seq_len", "batch_size", "mesh", "collective", "zero", "pattern",
    "remat", "accumulate", "parameters", "state_bytes",
)  # fmt: skip


def _key(row: Row) -> str:
    """Returns text that identifies a plan's candidate; equal texts are plans of the same one."""
    return json.dumps([row[field] for field in _SAME_IN])


def memory_bars(rows: list[Row], path: Path) -> None:
    """Draws what fills a device's HBM, a bar per plan: parameters, optimizer state and the rest."""
    figure, axes = plt.subplots(figsize=(3.5 + 0.7 * len(rows), 4.5), layout="constrained")
    bottom = [0.0] * len(rows)
    for what in ("parameters", "optimizer", "other"):
        heights = []
        for row in rows:
            state = row["state_bytes"]
            other = row["needed_bytes"] - sum(state.values())
            heights.append((state | {"other": other})[what] / GIB)
        label = "activations, gradients, batch" if what == "other" else what
        axes.bar(range(len(rows)), heights, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights)]
    for i, row in enumerate(rows):
        limit = usable_bytes(row) / GIB
        axes.plot(
            [i - 0.45, i + 0.45], [limit, limit], color="black", label="HBM" if i == 0 else None
        )
    labels = [
        f"{row['topology']}\n{name(row)}\n{row['batch_size']} x {row['seq_len']}" for row in rows
    ]
    axes.set_xticks(range(len(rows)), labels, fontsize=6, rotation=45, ha="right")
    axes.set(ylabel="GiB per device")
    axes.legend(fontsize=7)
    plots.save(figure, path, dpi=110)


def scaling(rows: list[Row], path: Path) -> None:
    """Draws a step's time per token and device, and its collectives' share, over device count.

    Times are estimates; each collective that carries states between devices has its own curve.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    rows = [row for row in rows if "estimate" in row]
    for i, collective in enumerate(dict.fromkeys(row["collective"] for row in rows)):
        here = [row for row in rows if row["collective"] == collective]
        x = [row["devices"] for row in here]
        look = {"color": f"C{i}", "marker": "o", "markersize": 4}
        label = collective or "no seq axis"
        left.plot(x, [line(row)["ns per token and device"] for row in here], label=label, **look)
        for what, style in (("waiting", "-"), ("communication", ":")):
            shares = [
                100 * r["estimate"][f"{what}_seconds"] / r["estimate"]["seconds"] for r in here
            ]
            right.plot(x, shares, style, label=f"{label}, {_WORDS[what]}", **look)
    left.set(ylabel="estimated ns per token and device", ylim=(0, None))
    right.set(ylabel="collectives, % of the step", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="devices")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    plots.save(figure, path, dpi=110)


_WORDS = {"waiting": "waited for", "communication": "all, hidden or not"}
