"""Finds chunk and block sizes for the table that `kernels_pallas.dispatch.tuning` reads: `bench
tune`.

A call is traced to learn which keys it looks up. Then one size after another takes its candidates,
the rest standing as they are. The sizes in use stay unless another is worth it (2 % in cycles, 4 %
in time), and of those near the best the smallest is taken: it compiles sooner. The cost is that of
forward and backward together: they share their chunks, since a call does not know whether it will
be differentiated. On a topology it is static cycles in kernels, as compiled (no run, no waiting for
HBM). On the device at hand it is time, where all candidates of a size run in turn. A candidate that
does not fit or compile is out; nothing that raises is ever chosen.
"""

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import entries, operators, static_cost, timing
from kernels_pallas.dispatch import tuning
from kernels_pallas.tools import tpu_bundles, tpu_compile

OPS = ("linear_attention", "delta_rule", "diagonal_scan")
# By implementation and the sizes' names, going up: of candidates that come to the same the smallest
# is taken.
CANDIDATES = {
    "pallas_tpu": {"chunk_size": (64, 128, 256), "heads": (2, 4, 8), "width": (4, 8, 16)},
    "triton": {
        "BK": (32, 64, 128),
        "BV": (16, 32, 64, 128),
        "C": (32, 64, 128),
        "BD": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    "chunked": {"chunk_size": (32, 64, 128, 256)},
}
# Longer chunks of the delta rule lose accuracy in float32 where beta is 2: that size is not speed's
# to choose.
FIXED = {("delta_rule", "float32"): ("chunk_size",)}
PLATFORMS = {"tpu": ("pallas_tpu",), "gpu": ("triton", "chunked"), "cpu": ("chunked",)}
FOLDER = Path(tuning.__file__).parent
REPORTS = FOLDER.parent / "reports"


class Job(NamedTuple):
    """An operator call to tune for.

    shape: 'target' or a published name. variant: kind of call. topology: the TPU slice to compile
      for; None times the call on the device at hand.
    """

    op: str
    shape: str
    variant: str
    dtype: str
    implementation: str
    topology: str | None


class Found(NamedTuple):
    """Result of tuning one key of the table: its best sizes.

    costs: every choice of sizes that was tried, and its cost in `unit`; None where it raised.
    """

    key: str
    sizes: dict[str, int]
    costs: list[tuple[dict[str, int], float | None]]
    unit: str


def jobs(ops, shapes, dtype: str, implementations, topologies) -> list[Job]:
    """Returns the operator calls to tune for, in all combinations of the arguments.

    shapes: 'target', published names, or None for all; an operator skips those that it lacks.
    topologies: TPU slices to compile for; None among them is the device at hand.
    """
    found = []
    for op in ops:
        case = operators.CASES[op]
        for name in ("target", *case.shapes):
            if shapes is not None and name not in shapes:
                continue
            for variant in static_cost.workload(case, name)[2]:
                for topology in topologies:
                    found += [
                        Job(op, name, variant, dtype, implementation, topology)
                        for implementation in implementations
                        if implementation in case.implementations
                    ]
    return found


def run(found_jobs: list[Job], rounds: int, seconds: float) -> Iterator[Found]:
    """Yields the best sizes of each key of the table that the jobs' calls look up, a key once."""
    done = set()
    for job in found_jobs:
        call, abstract = _call(job)
        with tuning.asked() as asked:
            _trace(job, call, abstract)
        own = f"{job.op}/{job.implementation}/"
        keys = {key: x for key, x in asked.items() if key.startswith(own) and key not in done}
        done |= keys.keys()
        measure = _static(job) if job.topology else _timed(job, rounds, seconds)
        best: dict[str, dict[str, int]] = {}
        for key, start in keys.items():
            found = _descend(job, key, start, best, measure)
            best[key] = found.sizes
            yield found


def _descend(job, key, start, best, measure) -> Found:
    """Tunes the sizes of one key, one size after another (coordinate descent).

    start: sizes in use. best: sizes of the keys tuned before. measure: list of choices -> their
      costs.
    """
    costs, sizes = [], dict(start)
    unit, worth = ("static cycles per token and head", 0.98) if job.topology else ("seconds", 0.96)
    for name in start:
        if name in FIXED.get((job.op, job.dtype), ()):
            continue
        candidates = CANDIDATES[job.implementation][name]
        options = [sizes, *(sizes | {name: x} for x in candidates if x != sizes[name])]
        measured = measure([best | {key: option} for option in options])
        if measured[0] is None:
            raise ValueError(f"{job}: the sizes in use do not run: {sizes}")
        costs += [
            (x, c) for x, c in zip(options, measured) if x not in [tried for tried, _ in costs]
        ]
        lowest = min(cost for cost in measured if cost is not None)
        near = [x for x, c in zip(options, measured) if c is not None and worth * c <= lowest]
        sizes = near[0]
    return Found(key, sizes, costs, unit)


def _call(job: Job) -> tuple[Callable, Any]:
    """Returns a job's call with gradients as a new, uncached function, and its inputs' shapes."""
    case = operators.CASES[job.op]
    shape, T, _ = static_cost.workload(case, job.shape)
    inputs = static_cost.abstract_inputs(case, shape, T, job.variant, job.dtype)
    model = static_cost.as_models_call
    call, arguments = model(case.function(job.implementation, job.variant, shape), inputs)
    definition, _ = model(case.function("reference", job.variant, shape), inputs)
    cotangents = jax.eval_shape(definition, arguments)
    return entries.with_gradients(call), (arguments, cotangents)


def _trace(job, call, abstract) -> None:
    if job.topology is None:
        jax.eval_shape(call, *abstract)
        return
    with tpu_compile.tracing_for(job.topology):
        jax.eval_shape(call, *abstract)


def _static(job: Job):
    case = operators.CASES[job.op]
    shape, T, _ = static_cost.workload(case, job.shape)
    heads = -(-shape.width // 128) if job.op == "diagonal_scan" else shape.H
    known: dict[str, float | None] = {}

    def one(trial) -> float | None:
        text = json.dumps(trial, sort_keys=True)
        if text not in known:
            call, abstract = _call(job)
            try:
                with tuning.trying(trial):
                    program = tpu_bundles.measure(job.topology, call, *abstract)
                cycles = sum(kernel.cycles for kernel in program.kernels)
                known[text] = round(cycles / (shape.B * T * heads), 3)
            except (NotImplementedError, jax.errors.JaxRuntimeError):
                known[text] = None
        return known[text]

    return lambda trials: [one(trial) for trial in trials]


def _timed(job: Job, rounds: int, seconds: float):
    case = operators.CASES[job.op]
    shape, T, _ = static_cost.workload(case, job.shape)
    problem = operators.make_problem(case, shape, T, job.variant, job.dtype)

    def measure(trials) -> list[float | None]:
        ready = {}
        for i, trial in enumerate(trials):
            entry = case.entry(job.implementation, job.variant, shape)
            try:
                with tuning.trying(trial):
                    prepared = entry.prepare(problem, True)
                prepared.run()
                ready[i] = prepared.run
            except (NotImplementedError, jax.errors.JaxRuntimeError):
                continue
        took = timing.interleaved(ready, rounds, seconds)
        return [took[i].median if i in took else None for i in range(len(trials))]

    return measure


def save(folder: Path, found: list[Found]) -> None:
    """Saves best sizes in the folder's tuned.json, and all choices tried in reports/tuning.json."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = REPORTS if folder == FOLDER else folder / "reports"
    table, evidence = folder / tuning.TABLE.name, reports / "tuning.json"
    if not table.exists():
        table.write_text("{}")
    tuning.save({x.key: x.sizes for x in found}, table)
    evidence.parent.mkdir(exist_ok=True)
    rows = (
        {row["key"]: row for row in json.loads(evidence.read_text())} if evidence.exists() else {}
    )
    versions = {name: _version(name) for name in ("jax", "libtpu", "triton")}
    for x in found:
        tried = [{**sizes, "cost": cost} for sizes, cost in x.costs]
        rows[x.key] = {"key": x.key, "unit": x.unit, "tried": tried, "versions": versions}
    lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
    evidence.write_text(f"[\n{lines}\n]\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(found: Found) -> list[dict]:
    """Returns a table row for each choice of sizes tried for a key, with the best one marked."""
    return [
        {**sizes, found.unit: cost, "": "taken" if sizes == found.sizes else ""}
        for sizes, cost in found.costs
    ]
