"""Runs, judges, draws and keeps claims, one after the other."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import claims
from experiments.claims import kept
from experiments.claims.context import Context
from experiments.launch import cli

MISSING = "missing"


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of `only`, all claims' if empty. Raises UserError for unknown ones.

    "missing" stands for all claims that have no kept result yet.
    """
    names = cli.chosen("only", only, [*claims.names(), MISSING]) or tuple(claims.names())
    missing = [name for name in claims.names() if not kept.read(name)]
    return tuple(missing) if MISSING in names else names


def run(names: Sequence[str], workdir: Path, smoke: bool, out: Path | None) -> list[str]:
    """Runs claims and keeps their results; returns the names of those that could not be measured.

    workdir: where trained runs are kept and found.
    out: a folder for results and pictures; None: those in the repository.
    """
    missing = []
    for name in names:
        try:
            record = kept.make(name, Context(workdir, claims.load(name).seeds, smoke))
            _keep(record, out)
        except Exception:  # the others still run
            traceback.print_exc()
            missing.append(name)
    return missing


def judge(names: Sequence[str], out: Path | None) -> list[str]:
    """Judges and draws kept measurements anew; returns the names of claims that have none."""
    records = {name: kept.read(name, out or kept.RESULTS) for name in names}
    for name, record in records.items():
        if record:
            _keep(kept.judged(name, record), out)
    return [name for name, record in records.items() if record is None]


def _keep(record: dict, out: Path | None) -> None:
    kept.write(record, out or kept.RESULTS, out or kept.PICTURES)
    print(kept.summary(record), flush=True)


def compile_once(folder: Path) -> None:
    """Keeps compiled programs in a folder, unless JAX was told where: seeds compile once."""
    if not jax.config.jax_compilation_cache_dir:
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
