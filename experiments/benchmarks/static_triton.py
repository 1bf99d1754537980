"""Measures, stores and prints Triton kernels as compiled for GPUs, for `bench gpu_report`.

Nothing is run.
"""

import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from experiments.benchmarks import entries, operators, report, static_cost
from kernels_pallas.tools import triton_compile

OPS = ("linear_attention", "delta_rule", "diagonal_scan")
FOLDER = static_cost.FOLDER.parent / "gpu"
NOTE = (
    "Compiled figures, not runs: registers and stack per thread and shared memory per program, as "
    "Triton and ptxas leave them. MB: each launch's arrays once; least: the call's inputs read and "
    "results written once."
)
_GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))


def rows(op: str, shape_name: str, dtype: str, capabilities) -> list[dict]:
    """Compiles an operator's Triton kernels, both passes; returns a row of figures per kernel.

    capabilities: of GPUs, such as 90. Launches of a kernel with equal figures share a row.
    """
    case = operators.CASES[op]
    shape, T, variants = static_cost.workload(case, shape_name)
    found = []
    for variant in (v for v in variants if v != "complex"):
        inputs = static_cost.abstract_inputs(case, shape, T, variant, dtype)
        function = entries.with_gradients(case.function("triton", variant, shape))
        outputs = jax.eval_shape(case.function("chunked", variant, shape), inputs)
        with jax.sharding.use_abstract_mesh(_GPU):
            launches = triton_compile.launches(function, inputs, outputs)
        least = _megabytes((inputs, inputs, outputs, outputs))
        moved = sum(_megabytes((x.inputs, x.outputs)) for x in launches)
        for capability in capabilities:
            seen = []
            for launch in launches:
                figures = triton_compile.compile_launch(launch, capability)
                if figures in seen:
                    continue
                seen.append(figures)
                found.append(
                    {
                        "op": op,
                        "shape": shape_name,
                        "variant": variant,
                        "dtype": dtype,
                        "target": f"sm_{capability}",
                        **figures._asdict(),
                        "launches": launches.count(launch),
                        "program MB": round(moved, 1),
                        "least MB": round(least, 1),
                    }
                )
    return found


def _megabytes(tree) -> float:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) / 1e6


def key(row: dict) -> tuple:
    """Returns what identifies a compiled program; rows of all its kernels are replaced together."""
    return tuple(row[name] for name in ("op", "shape", "variant", "dtype", "target"))


def save(folder: Path, new: list[dict]) -> None:
    """Saves rows of compiled kernels in triton.json, and all rows saved there as triton.md."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "triton.json"
    saved = json.loads(path.read_text()) if path.exists() else {"rows": []}
    replaced = {key(row) for row in new}
    others = [row for row in saved["rows"] if key(row) not in replaced]
    ordered = sorted([*others, *new], key=key)  # stable: kernels keep their order
    versions = {name: importlib.metadata.version(name) for name in ("triton", "jax")}
    path.write_text(json.dumps({"versions": versions, "rows": ordered}, indent=1) + "\n")
    parts = [
        "# Triton kernels, as compiled",
        NOTE,
        f"Written by `python -m experiments.bench gpu_report` (Triton {versions['triton']}).",
    ]
    for op in OPS:
        lines = [line(row) for row in ordered if row["op"] == op]
        parts += [f"## {op}", report.markdown_table(lines)] if lines else []
    (folder / "triton.md").write_text("\n\n".join(parts) + "\n")


def line(row: dict) -> dict:
    """Returns one compiled kernel's figures as a row of the printed table."""
    names = ("shape", "variant", "dtype", "target", "kernel", "warps", "registers", "spilled")
    return {name: row[name] for name in names} | {
        "grid": "x".join(map(str, row["grid"])),
        "shared KB": round(row["shared"] / 1024, 1),
        "fits": row["shared"] <= row["limit"],
        "MB": round(row["bytes"] / 1e6, 1),
        "all/least": round(row["program MB"] / row["least MB"], 2),
    }
