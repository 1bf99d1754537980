"""Compares our chunked forms with transformers and jax-linear-attention on the CPU, for
`experiments.bench cpu_peers`.

jax-linear-attention pins another JAX than the oracles' Python can have, so a run compares with the
peers that its interpreter has. Each peer's figures are kept in <peer>.json with ours of the same
run, and one table shows them all.
"""

import dataclasses
import functools
import importlib.metadata
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks import machine, operators, peak_memory, report, static_cost, sweep
from experiments.benchmarks.entries import BenchmarkEntry, Prepared
from experiments.benchmarks.peers import Comparison, jax_peer_entry, torch_entry

OURS = "chunked"
LIMIT = 0.6
FOLDER = static_cost.FOLDER.parent / "cpu"
SHAPE = operators.Shape(B=2, H=8, K=64, V=64)
LENGTH = 2048
MEMORY_LENGTH = 65536  # with one sequence
INSTALL = {
    "transformers": "pip install -e '.[oracles]'",
    "jla": "pip install jax-linear-attention==0.1, on Python 3.12 or later",
}
_DISTRIBUTIONS = {"transformers": ("transformers", "torch"), "jla": ("jax-linear-attention",)}


def _transformers(x):
    from transformers.models.qwen3_next import modeling_qwen3_next

    # Unwrapped: with flash-linear-attention installed, the name stands for its kernel.
    chunked = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    states = {"initial_state": x["initial_state"], "output_final_state": True}
    return chunked(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], **states)


def _jla_linear_attention(kind: str, x):
    from jla.ops import linear_attention

    gates = {"g": x.get("log_decay"), "beta": x.get("beta")}
    states = {"initial_state": x["initial_state"], "output_final_state": True}
    return linear_attention(kind, x["q"], x["k"], x["v"], impl="chunked", **gates, **states)


def _jla(kind: str):
    """Returns jax-linear-attention's operator `kind`, chunked, as a partial that can be pickled."""
    return functools.partial(_jla_linear_attention, kind)


COMPARISONS = (
    Comparison("Gated DeltaNet", "delta_rule", "per_token", "transformers", _transformers, LIMIT),
    Comparison("Gated DeltaNet", "delta_rule", "per_token", "jla", _jla("gated_deltanet"), LIMIT),
    Comparison("KDA", "delta_rule", "per_channel", "jla", _jla("kda"), LIMIT),
    Comparison("DeltaNet", "delta_rule", "none", "jla", _jla("deltanet"), LIMIT),
    Comparison("Mamba-2 SSD", "linear_attention", "per_token", "jla", _jla("simple_gla"), LIMIT),
    Comparison("GLA", "linear_attention", "per_channel", "jla", _jla("gla"), LIMIT),
)
NAMES = tuple(dict.fromkeys(comparison.name for comparison in COMPARISONS))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the comparison on a CPU. rounds, seconds: see `timing.interleaved`.

    length: tokens per sequence when timed. memory_length: tokens of the one sequence for memory.
    """

    shape: operators.Shape = SHAPE
    length: int = LENGTH
    memory_length: int = MEMORY_LENGTH
    dtype: str = "float32"
    rounds: int = 15
    seconds: float = 12.0


def peer_entry(comparison: Comparison) -> BenchmarkEntry:
    install = INSTALL[comparison.package]
    if comparison.package == "jla":
        return jax_peer_entry(comparison, install)
    return torch_entry(comparison, "cpu", install)


def compare(name: str, settings: Settings, log=print) -> list[dict]:
    """Times our chunked implementation and its installed peers in turn, if their results are right.

    name: of the comparison, such as "KDA". Truth is the recurrence in float64. Returns a row for
      each peer and pass; its `verdicts` say why a figure is missing.
    """
    chosen = [c for c in COMPARISONS if c.name == name]
    sweeping = sweep.Settings(
        shape=settings.shape,
        lengths=(settings.length,),
        dtype=settings.dtype,
        implementations=(OURS,),
        rounds=settings.rounds,
        seconds=settings.seconds,
    )
    case, variant = operators.CASES[chosen[0].op], chosen[0].variant
    peers = [peer_entry(c) for c in chosen]
    timings, checks = sweep.run(case, variant, sweeping, peers, log)
    verdicts = {check["implementation"]: sweep.verdict(check) for check in checks}
    found = {(row["implementation"], row["pass"]): row for row in timings if "seconds" in row}
    rows = []
    for comparison in chosen:
        for which in sweep.PASSES:
            ours, peer = (found.get((x, which)) for x in (OURS, comparison.package))
            rows.append(
                {
                    "comparison": name,
                    "peer": comparison.package,
                    "sizes": case.sizes(settings.shape) | {"T": settings.length},
                    "dtype": settings.dtype,
                    "pass": which,
                    "ours": ours and _figures(ours),
                    "theirs": peer and _figures(peer),
                    "ratio": ours["seconds"] / peer["seconds"] if ours and peer else None,
                    "limit": comparison.limit if which == "forward_backward" else None,
                    "verdicts": {x: verdicts[x] for x in (OURS, comparison.package)},
                }
            )
    return rows


def _figures(row: dict) -> dict:
    return {name: row[name] for name in ("seconds", "seconds_lower", "seconds_upper", "rounds")}


def memory(name: str, settings: Settings, log=print) -> list[dict]:
    """Measures peak memory of forward+backward on one sequence, ours and each peer's.

    name: of the comparison, such as "KDA". Each is measured in a process of its own, and has a row.
    """
    rows = []
    for comparison in (c for c in COMPARISONS if c.name == name):
        for which in (OURS, comparison.package):
            row = {"comparison": name, "peer": comparison.package, "implementation": which}
            row |= {"T": settings.memory_length, "dtype": settings.dtype, "note": None}
            try:
                found = peak_memory.measure(_prepare_long, comparison, which, settings)
            except NotImplementedError as reason:
                found = {"peak_bytes": None, "planned_bytes": None, "note": str(reason)}
            rows.append(row | found)
            log(report.text_table([memory_line(rows[-1])]))
    return rows


def _prepare_long(comparison: Comparison, which: str, settings: Settings) -> Prepared:
    case, shape = operators.CASES[comparison.op], dataclasses.replace(settings.shape, B=1)
    problem = operators.make_problem(
        case, shape, settings.memory_length, comparison.variant, settings.dtype
    )
    if which == OURS:
        return case.entry(OURS, comparison.variant, shape).prepare(problem, True)
    return peer_entry(comparison).prepare(problem, True)


def line(row: dict) -> dict:
    """Returns one comparison's times as a row of the printed table: ours, the peer's, the ratio."""
    ours, theirs = row["ours"], row["theirs"]
    figures = {}
    for name, found in (("ours", ours), ("peer", theirs)):
        figures[f"{name} ms"] = 1e3 * found["seconds"] if found else "not run"
        quartiles = found and (found["seconds_lower"], found["seconds_upper"])
        figures[f"{name} q1-q3"] = "-".join(f"{1e3 * x:.0f}" for x in quartiles or ()) or "-"
    return {
        "": row["comparison"],
        "peer": row["peer"],
        "pass": row["pass"].replace("_", "+"),
        **figures,
        "ours/peer": row["ratio"],
        "at most": row["limit"],
    }


def memory_line(row: dict) -> dict:
    mib = {name: row[name] and row[name] / 2**20 for name in ("peak_bytes", "planned_bytes")}
    return {
        "": row["comparison"],
        "implementation": row["implementation"],
        "T": row["T"],
        "peak MiB": mib["peak_bytes"],
        "planned temp MiB": mib["planned_bytes"],
        "note": row["note"] or "",
    }


def targets(rows: Sequence[dict]) -> list[report.Target]:
    found = []
    for row in (row for row in rows if row["limit"] is not None):
        claim = f"{row['comparison']}: forward+backward at most {row['limit']}x of {row['peer']}"
        if row["ratio"] is None:
            why = row["verdicts"][row["peer"]] if row["ours"] else row["verdicts"][OURS]
            found.append(report.Target(claim, why, None))
        else:
            found.append(report.Target(claim, f"{row['ratio']:.2f}", row["ratio"] <= row["limit"]))
    return found


def save(folder: Path, parts: dict[str, list[dict]]) -> None:
    """Writes measured rows into <peer>.json, and all peers' saved rows as tables into tables.md.

    parts: {"timing" or "memory": rows}; they replace all of a peer's older rows of that kind. The
      file of a peer that was not measured stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = machine.environment()
    for package, distributions in _DISTRIBUTIONS.items():
        path = folder / f"{package}.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        for part, rows in parts.items():
            rows = [row for row in rows if row["peer"] == package]
            if not any(_of_the_peer(row) for row in rows):
                continue
            versions = {name: importlib.metadata.version(name) for name in distributions}
            here = environment | {"versions": environment["versions"] | versions}
            saved[part] = {"environment": here, "rows": rows}
        if saved:
            path.write_text(json.dumps(saved, indent=1) + "\n")
    (folder / "tables.md").write_text("\n\n".join(_tables(folder)) + "\n")


def _of_the_peer(row: dict) -> bool:
    """Returns whether a row holds a measurement of the peer, and not of our form alone."""
    if "theirs" in row:
        return row["theirs"] is not None
    return row["implementation"] == row["peer"] and row["peak_bytes"] is not None


def _tables(folder: Path) -> list[str]:
    saved = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = ["# Chunked forms against their peers on CPU"]
    found.append(
        "Written by `python -m experiments.bench cpu_peers`. Ours and the peer are checked against "
        "the recurrence in float64, then timed in turn in one run: medians and quartiles; only "
        "ratios hold from run to run."
    )
    rows = []
    for part in (x["timing"] for x in saved if "timing" in x):
        rows += part["rows"]
        first = part["rows"][0]
        sizes = ", ".join(f"{name} {value}" for name, value in first["sizes"].items())
        found.append(
            f"- {first['peer']}: {sizes}, {first['dtype']}; {machine.describe(part['environment'])}"
        )
    if rows:
        found.append(report.markdown_table([line(row) for row in rows]))
        found.append("```\n" + report.targets_text(targets(rows)) + "\n```")
    memory_parts = [x["memory"] for x in saved if "memory" in x]
    if memory_parts:
        found.append("## Memory of forward+backward, one sequence")
        found.append(
            "Peak: what one call adds to a fresh process, outputs and gradients with it, inputs "
            "and cotangents without (VmHWM). Planned: what the compiler reserves beside inputs and "
            "results."
        )
        found += [f"- {machine.describe(part['environment'])}" for part in memory_parts]
        lines = [memory_line(row) for part in memory_parts for row in part["rows"]]
        found.append(report.markdown_table(lines))
    return found
