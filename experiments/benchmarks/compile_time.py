"""Measures compile time of a training step over depth: repeated layers are compiled once."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from configs import delta_net_340m
from experiments.benchmarks import timing
from experiments.benchmarks.report import Row, Section, Target
from experiments.data import batches
from experiments.training import steps


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the compile-time benchmark.

    depths: layers of the whole model and of the shortened one. batch, length: sequences, and tokens
      in each, of the training step (compile time hardly depends on the batch). rounds:
      compilations.
    """

    depths: tuple[int, int] = (24, 4)
    batch: int = 8
    length: int = 256
    rounds: int = 3


def step_config(num_layers: int, settings: Settings) -> ConfigDict:
    """Returns the DeltaNet 340M config with `num_layers` layers and the settings' batch size."""
    config = delta_net_340m.get_config()
    config.model.num_layers = num_layers
    config.data.update({"batch_size": settings.batch, "seq_len": settings.length})
    return config


def compile_step(config: ConfigDict) -> Row:
    """Returns seconds to trace, lower and compile a config's training step, and its parameters."""
    program = steps.build(config, config.data.seq_len)
    size = (config.data.batch_size, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(size, x.dtype) for name, x in batches.empty(1, 1).items()}
    start = time.perf_counter()
    traced = program.train_step.trace(program.abstract_state, batch)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {
        "trace": traced_at - start,
        "lower": lowered_at - traced_at,
        "compile": end - lowered_at,
        "total": end - start,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params)),
    }


def section(settings: Settings, folder: Path, title: str) -> Section:
    """Measures compile time at both depths (numbers of layers); returns the report's section."""
    del folder, title  # no picture
    rows = run(settings)
    given = (
        dataclasses.asdict(settings) | step_config(max(settings.depths), settings).model.to_dict()
    )
    return Section("compile", given, rows, [display(row) for row in rows], targets(rows))


def run(settings: Settings, log: Callable[[str], None] = print) -> list[Row]:
    """Compiles each depth in turn, caches emptied; returns a row of median seconds per depth."""
    found = {depth: [] for depth in settings.depths}
    log("compile: once to warm up")
    compile_step(step_config(min(settings.depths), settings))
    for i in range(settings.rounds):
        for depth in settings.depths[:: 1 if i % 2 else -1]:
            jax.clear_caches()
            found[depth].append(compile_step(step_config(depth, settings)))
            log(f"compile: {depth} layers in {found[depth][-1]['total']:.1f} s")
    totals = {d: timing.summary([x["total"] for x in samples]) for d, samples in found.items()}
    shortest = totals[min(settings.depths)].median
    return [
        {
            "layers": depth,
            "parameters": samples[0]["parameters"],
            **{
                part: timing.summary([x[part] for x in samples]).median
                for part in ("trace", "lower", "compile")
            },
            "total": totals[depth].median,
            "total_lower": totals[depth].lower,
            "total_upper": totals[depth].upper,
            "ratio": totals[depth].median / shortest,
        }
        for depth, samples in found.items()
    ]


def display(row: Row) -> Row:
    """Returns one depth's measurements as a row of the printed table."""
    return {
        "layers": row["layers"],
        "parameters, M": row["parameters"] / 1e6,
        "trace s": row["trace"],
        "lower s": row["lower"],
        "compile s": row["compile"],
        "total s": row["total"],
        "q1": row["total_lower"],
        "q3": row["total_upper"],
        "x cut": row["ratio"],
    }


def targets(rows: list[Row]) -> list[Target]:
    deep = max(rows, key=lambda row: row["layers"])
    cut = min(row["layers"] for row in rows)
    claim = f"compile time of {deep['layers']} layers at most 1.5x that of {cut}"
    return [Target(claim, f"{deep['ratio']:.2f}", deep["ratio"] <= 1.5)]
