"""Operators over length: every implementation is checked, and those that are right are timed in
turn.

A new kernel takes part by standing in its operator's IMPLEMENTATIONS; another library through
`peers`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.benchmarks import correctness, machine, operators, pictures, timing
from experiments.benchmarks.entries import BenchmarkEntry, Prepared
from experiments.benchmarks.report import Row, Section, Target

PASSES = ("forward", "forward_backward")
MATRIX_RECURRENCES = ("linear_attention", "delta_rule")
RECURRENCES = (*MATRIX_RECURRENCES, "diagonal_scan")
_MEMORY_SHARE = 0.8
_SECONDS = ("seconds", "seconds_lower", "seconds_upper")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a sweep over lengths. rounds, seconds: see `timing.interleaved`.

    implementations: names; None is all that the operator has. check_length: T of the problem that
      results are checked on; the default is several chunks and an incomplete one.
    """

    shape: operators.Shape = operators.Shape()
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    dtype: str = "float32"
    implementations: tuple[str, ...] | None = None
    passes: tuple[str, ...] = PASSES
    rounds: int = 15
    seconds: float = 2.0
    check_length: int = 300


def section(
    case: operators.OperatorBenchmark,
    variants: Sequence[str],
    settings: Settings,
    folder: Path,
    title: str,
    peers: Sequence[BenchmarkEntry] = (),
) -> Section:
    """Measures variants of an operator and `peers`, and draws <operator>.png in `folder`."""
    rows, checks = [], []
    for variant in variants:
        more_rows, more_checks = run(case, variant, settings, peers)
        rows, checks = rows + more_rows, checks + more_checks
    if any("seconds" in row for row in rows):
        pictures.time_per_token(rows, folder / f"{case.name}.png", title)
    return Section(
        case.name,
        {"dtype": settings.dtype} | case.sizes(settings.shape),
        rows,
        [display(row) for row in rows],
        targets(case.name, rows),
        checks,
        _notes(settings, checks),
        any(check["wrong"] for check in checks),
    )


def run(
    case: operators.OperatorBenchmark,
    variant: str,
    settings: Settings,
    peers: Sequence[BenchmarkEntry] = (),
    log: Callable[[str], None] = print,
) -> tuple[list[Row], list[Row]]:
    """Checks all entries of a variant and times those that are right; returns timings and
    checks."""
    names = case.implementations if settings.implementations is None else settings.implementations
    entries = [case.entry(name, variant, settings.shape) for name in names]
    checks, sound = check(case, variant, settings, [*entries, *peers], log)
    rows = []
    for which in settings.passes:
        rows += _time(case, variant, settings, sound, which, log)
    return rows, checks


def check(case, variant, settings, entries, log) -> tuple[list[Row], list[BenchmarkEntry]]:
    """Checks entries against the float64 recurrence; returns a row for each, and the right ones."""
    limit = correctness.tolerance(settings.dtype)
    few_rows = dataclasses.replace(settings.shape, B=min(settings.shape.B, 2))
    problem = operators.make_problem(case, few_rows, settings.check_length, variant, settings.dtype)
    definition = case.function(operators.DEFINITION, variant, settings.shape)
    expected = correctness.truth(definition, problem)
    rows, sound = [], []
    for entry in entries:
        row = {"operator": case.name, "variant": variant, "implementation": entry.name}
        row |= {"T": settings.check_length, "tolerance": limit}
        try:
            found = correctness.errors(entry, problem, expected)
        except NotImplementedError as reason:
            row |= {"errors": None, "wrong": None, "unsupported": str(reason)}
        else:
            row |= {"errors": found, "wrong": correctness.wrong(found, limit), "unsupported": None}
        if row["errors"] and not row["wrong"]:
            sound.append(entry)
        rows.append(row)
        log(f"{case.name} ({variant}), {entry.name}: {verdict(row)}")
    return rows, sound


def verdict(check: Row) -> str:
    """Describes the check of an entry: not supported, wrong, or right with its largest error."""
    if check["unsupported"]:
        return f"not supported: {check['unsupported']}"
    if check["wrong"]:
        return f"WRONG, so not timed: {check['wrong']}"
    return f"right, largest error {max(check['errors'].values()):.1e}"


def _notes(settings: Settings, checks: list[Row]) -> list[str]:
    return [
        f"checked at T {settings.check_length}, outputs and gradients at every position, against "
        "the recurrence in float64; errors are relative to a tensor's rms, tolerance "
        f"{correctness.tolerance(settings.dtype):.0e}",
        *(f"{check['variant']}, {check['implementation']}: {verdict(check)}" for check in checks),
        "temp MiB: what the compiled program plans for beside inputs and outputs, not measured",
    ]


def _time(case, variant, settings, entries, which, log) -> list[Row]:
    prepared, notes = {}, {}
    for T in settings.lengths:
        problem = operators.make_problem(case, settings.shape, T, variant, settings.dtype)
        for entry in entries:
            try:
                one = entry.prepare(problem, which == "forward_backward")
                notes[T, entry.name] = _too_large(one)
            except NotImplementedError as reason:
                notes[T, entry.name] = f"not supported: {reason}"
            if not notes[T, entry.name]:
                prepared[T, entry.name] = one
    log(f"{case.name}, {variant}, {which}: timing {len(prepared)} programs in turn")
    calls = {key: one.run for key, one in prepared.items()}
    timings = timing.interleaved(
        calls,
        settings.rounds,
        settings.seconds,
        together=lambda key: key[1],  # the recurrence's backward pass takes gigabytes
    )
    rows = []
    for (T, name), note in notes.items():
        row = {
            "operator": case.name,
            "variant": variant,
            "pass": which,
            "T": T,
            "implementation": name,
        }
        if (T, name) in timings:
            one, baseline = prepared[T, name], timings.get((T, operators.DEFINITION))
            took = timings[T, name]
            row |= took.row() | {
                "token_us": 1e6 * took.median / (settings.shape.B * T),
                "speedup": baseline and baseline.median / took.median,
                "temp_bytes": one.temp_bytes,
                "compile_seconds": one.compile_seconds,
            }
        rows.append(row | {"note": note})
    return rows


def _too_large(prepared: Prepared) -> str | None:
    """Returns why a program needs too much memory to be run; None if it fits in what is free.

    Some platforms kill a process that asks for too much.
    """
    if prepared.total_bytes is None:
        return None
    free = machine.free_bytes()
    if free is None or prepared.total_bytes < _MEMORY_SHARE * free:
        return None
    return f"not run: needs {prepared.total_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"


def display(row: Row) -> Row:
    """Returns one measurement as a row of the printed table."""
    ms = {name: row.get(name) and 1e3 * row[name] for name in _SECONDS}
    return {
        "variant": row["variant"],
        "pass": row["pass"].replace("_", "+"),
        "T": row["T"],
        "implementation": row["implementation"],
        "median ms": ms["seconds"],
        "q1": ms["seconds_lower"],
        "q3": ms["seconds_upper"],
        "us per token": row.get("token_us"),
        "x reference": row.get("speedup"),
        "temp MiB": row.get("temp_bytes") and row["temp_bytes"] / 2**20,
        "compile s": row.get("compile_seconds"),
        "note": row["note"] or "",
    }


def targets(operator: str, rows: list[Row]) -> list[Target]:
    """Returns whether an operator meets the speed targets that it has.

    These are the speedup of chunked over recurrent at T 2048 (matrix recurrences), and time per
    token at T 16384 against T 1024 (all recurrences).
    """
    at = {
        (row["T"], row["variant"], row["pass"]): row
        for row in rows
        if row["implementation"] == "chunked" and "seconds" in row
    }
    found = []
    if operator in MATRIX_RECURRENCES:
        ratios = {key[1:]: row["speedup"] for key, row in at.items() if key[0] == 2048}
        ratios = {key: ratio for key, ratio in ratios.items() if ratio}
        claim = f"{operator}: chunked at least 4x as fast as recurrent at T 2048"
        found.append(_target(claim, ratios, lambda x: x >= 4))
    if operator in RECURRENCES:
        ratios = {
            key[1:]: row["token_us"] / at[1024, *key[1:]]["token_us"]
            for key, row in at.items()
            if key[0] == 16384 and (1024, *key[1:]) in at
        }
        claim = f"{operator}: chunked, time per token at T 16384 at most 1.15x that at 1024"
        found.append(_target(claim, ratios, lambda x: x <= 1.15))
    return found


def _target(claim: str, ratios: dict, met: Callable[[float], bool]) -> Target:
    if not ratios:
        return Target(claim, "-", None)
    listed = ", ".join(f"{x:.2f} ({variant}, {which})" for (variant, which), x in ratios.items())
    return Target(claim, listed, all(map(met, ratios.values())))
