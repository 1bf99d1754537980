"""Measures, stores and prints kernels as compiled for a TPU, for `bench tpu_report`.

Nothing is run.
"""

import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import entries, operators, report
from kernels_pallas.tools import tpu_bundles, tpu_compile

OPS = ("linear_attention", "delta_rule", "diagonal_scan", "causal_conv", "document_sums")
PASSES = ("forward", "forward+backward")
IMPLEMENTATIONS = ("pallas_tpu", "chunked", "shifted")  # the last two are XLA's
# The sizes that targets are set at: Griffin's width for the scan, that of q and k for the
# convolution.
TARGET_SHAPE = {"B": 1, "T": 8192, "H": 16, "K": 128, "V": 128, "I": 4}
TARGET_WIDTH = {"diagonal_scan": 2560, "causal_conv": 2048}
BY_CHANNEL = tuple(TARGET_WIDTH)
FOLDER = Path(__file__).resolve().parents[2] / "kernels_pallas" / "reports" / "tpu"
# Most static cycles per token and head in kernels, on v6e at the target shape: forward, and with
# backward.
TARGETS = {
    ("linear_attention", "per_token"): (3, 9),
    ("linear_attention", "per_channel"): (10, 30),
    ("delta_rule", "none"): (15, 45),
    ("delta_rule", "per_token"): (15, 45),
    ("delta_rule", "per_channel"): (20, 60),
}
NOTE = (
    "Compiled figures, not runs: VLIW bundles of the compiled kernels, one per cycle where "
    "nothing stalls, without any wait for HBM. XLA's operations count by the compiler's own "
    "estimates; where it gives none, as for a change of layout, by the bytes they move, which "
    "are not in the cycles. The cost of spills is the bundles that are saved where the compiler "
    "packs the same kernel without them."
)
HEADING = (
    "Written by `python -m experiments.bench tpu_report`. Cycles are per token and head (a scan "
    "or convolution: per token and 128 channels). HBM: bytes that the program, or the kernel, "
    "moves against reading its inputs and writing its results once. The program's arguments are "
    "as a model has them: heads side by side, (B, T, heads * dim), as a projection gives them, "
    "and complex numbers as two planes, as they are computed. From (B, T, heads, dim) arrays "
    "that lie in memory as such, XLA would copy each to that layout first."
)


def workload(case: operators.OperatorBenchmark, name: str) -> tuple[operators.Shape, int, tuple]:
    """Returns (sizes, T, variants) of a shape of an operator; raises ValueError for an unknown one.

    'target' is the shape that targets are set at, in all variants; a published shape has its own.
    """
    if name == "target":
        sizes = {k: v for k, v in TARGET_SHAPE.items() if k in case.letters}
        if case.name in TARGET_WIDTH:
            sizes["D"] = TARGET_WIDTH[case.name]
        return operators.Shape(**sizes), TARGET_SHAPE["T"], case.variants
    if name not in case.shapes:
        raise ValueError(
            f"{case.name} has no shape {name!r}; choose one of target, {', '.join(case.shapes)}"
        )
    shape, length, variant = operators.published(case, name)
    return shape, length, (variant,)


def abstract_inputs(case, shape, T: int, variant: str, dtype: str) -> dict:
    """Returns an operator's inputs of length T as shapes and dtypes, without making arrays."""
    short, longer = (
        case.make_inputs(np.random.default_rng(0), shape, length, variant) for length in (2, 3)
    )
    inputs = {}
    for name, x in short.items():
        dims = tuple(T if i != j else i for i, j in zip(x.shape, longer[name].shape))
        narrow = name in case.rounded and not np.iscomplexobj(x)
        inputs[name] = jax.ShapeDtypeStruct(dims, jnp.dtype(dtype) if narrow else x.dtype)
    return inputs


def rows(op: str, shape_name: str, topology: str, dtype: str, implementations=IMPLEMENTATIONS):
    """Yields a row of costs as compiled for a TPU for every variant, implementation and pass."""
    case = operators.CASES[op]
    shape, T, variants = workload(case, shape_name)
    # Where channels are independent, a register holds 128 of them.
    heads = -(-shape.width // 128) if op in BY_CHANNEL else shape.H
    label = {"diagonal_scan": "numbers", "causal_conv": "form", "document_sums": "documents"}
    for variant in variants:
        inputs = abstract_inputs(case, shape, T, variant, dtype)
        for implementation in implementations:
            if implementation not in case.implementations:
                continue
            call, arguments = as_models_call(case.function(implementation, variant, shape), inputs)
            definition, _ = as_models_call(case.function("reference", variant, shape), inputs)
            cotangents = jax.eval_shape(definition, arguments)
            for name in PASSES:
                row = {
                    "op": op,
                    "shape": shape_name,
                    label.get(op, "decay"): variant,
                    "topology": topology,
                    "pass": name,
                    "implementation": implementation,
                    "dtype": dtype,
                    "sizes": case.sizes(shape) | {"T": T},
                    "jax": jax.__version__,
                    "libtpu": importlib.metadata.version("libtpu"),
                }
                program = call, arguments
                if name != "forward":
                    program = entries.with_gradients(call), arguments, cotangents
                yield row | _measure(topology, shape.B * T * heads, *program)


def as_models_call(call, inputs: dict):
    """Returns `call` on arrays in the layout that a model gives them, and its inputs' shapes.

    Heads lie side by side, (B, T, H K), as a projection gives them, and a complex array is the two
    real ones that it is computed from.
    """

    def given(x, name):
        if jnp.iscomplexobj(x):
            return jnp.real(x), jnp.imag(x)
        tokens_and_heads = x.ndim == 4 and "state" not in name
        return x.reshape(*x.shape[:2], -1) if tokens_and_heads else x

    def all_given(arrays):
        return {name: given(x, name) for name, x in arrays.items()}

    def taken(x, shape):
        return jax.lax.complex(*x) if isinstance(x, tuple) else x.reshape(shape)

    def flat_call(arrays):
        return all_given(call({name: taken(x, inputs[name].shape) for name, x in arrays.items()}))

    return flat_call, jax.eval_shape(all_given, inputs)


def _measure(topology: str, tokens_and_heads: int, function, *arguments) -> dict:
    try:
        program = tpu_bundles.measure(topology, function, *arguments)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error).strip().splitlines()[0][:300]}
    in_kernels = sum(kernel.cycles for kernel in program.kernels)
    ratio = None
    if program.hbm_bytes is not None:
        ratio = round(program.hbm_bytes / program.least_hbm_bytes, 3)
    return {
        "kernel_cycles": round(in_kernels / tokens_and_heads, 3),
        "xla_cycles": round(program.xla_cycles / tokens_and_heads, 3),
        "unestimated_bytes": program.unestimated_bytes,
        "hbm_bytes": program.hbm_bytes,
        "least_hbm_bytes": program.least_hbm_bytes,
        "hbm_ratio": ratio,
        "temp_bytes": program.compiled.memory.temp_size_in_bytes,
        "kernels": [_rounded(kernel._asdict()) for kernel in program.kernels],
    }


def _rounded(row: dict) -> dict:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def variant_of(row: dict) -> str:
    return next(row[name] for name in ("decay", "numbers", "form", "documents") if name in row)


def key(row: dict) -> tuple:
    """Returns what identifies a measurement; a new row replaces the saved row with an equal key."""
    order = (row["op"], row["topology"], row["shape"], variant_of(row), row["dtype"])
    return (*order, PASSES.index(row["pass"]), IMPLEMENTATIONS.index(row["implementation"]))


def save(folder: Path, new: list[dict]) -> None:
    """Saves rows, a JSON file per operator and TPU generation, and all saved rows as tables.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({_file(row) for row in new}):
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else []
        by_key = {key(row): row for row in [*old, *(row for row in new if _file(row) == name)]}
        ordered = [by_key[k] for k in sorted(by_key)]
        path.write_text(json.dumps(ordered, indent=1) + "\n")
    parts = ["# TPU kernels, as compiled", NOTE, HEADING]
    verdicts = []
    for path in sorted(folder.glob("*.json")):
        saved = json.loads(path.read_text())
        verdicts += targets(saved)
        parts += [f"## {path.stem}", report.markdown_table([program_line(r) for r in saved])]
        lines = [line for row in saved for line in kernel_lines(row)]
        parts += ["Kernels:", report.markdown_table(lines)] if lines else []
    if verdicts:
        parts += ["## Targets", "```\n" + report.targets_text(verdicts) + "\n```"]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")


def _file(row: dict) -> str:
    return f"{row['op']}_{row['topology'].split(':')[0]}.json"


def program_line(row: dict) -> dict:
    """Returns one compiled program's costs as a row of the table of programs."""
    named = row | {"variant": variant_of(row)}
    names = ("shape", "variant", "dtype", "topology", "pass", "implementation")
    return {name: named[name] for name in names} | {
        "cycles in kernels": row.get("kernel_cycles"),
        "in XLA": row.get("xla_cycles"),
        "MB without estimate": None if "error" in row else row["unestimated_bytes"] / 1e6,
        "HBM moved/least": row.get("hbm_ratio"),
        "temp MB": None if "error" in row else row["temp_bytes"] / 1e6,
        "": row.get("error", ""),
    }


def kernel_lines(row: dict) -> list[dict]:
    """Returns a table row for each kernel of one compiled program: cycles, slots, spills, VMEM."""
    named = row | {"variant": variant_of(row)}
    return [
        {name: named[name] for name in ("shape", "variant", "topology", "pass")}
        | {
            "kernel": kernel["name"],
            "grid": "x".join(map(str, kernel["grid"])),
            "bundles": kernel["bundles"],
            "cycles per step": kernel["step_cycles"],
            "MXU %": 100 * kernel["mxu_share"],
            "load slots %": 100 * kernel["load_share"],
            "store slots %": 100 * kernel["store_share"],
            "spills": kernel["spills"],
            "fills": kernel["fills"],
            "spills cost %": 100 * kernel["spill_share"],
            "VMEM KB": kernel["vmem_bytes"] / 1024,
            "HBM moved/least": None
            if kernel["hbm_bytes"] is None
            else kernel["hbm_bytes"] / kernel["least_hbm_bytes"],
        }
        for kernel in row.get("kernels", [])
    ]


def targets(found: list[dict]) -> list[report.Target]:
    """Returns whether kernels meet the targets for static cycles, spills and HBM traffic.

    Judged are Pallas kernels on v6e at the target shape in bfloat16; other rows are skipped.
    """
    verdicts = []
    for row in found:
        if (row["shape"], row["dtype"]) != ("target", "bfloat16"):
            continue
        if not row["topology"].startswith("v6e") or row["implementation"] != "pallas_tpu":
            continue
        variant = variant_of(row)
        name = f"{row['op']}, {variant}, {row['pass']}"
        if "error" in row:
            verdicts.append(report.Target(name, row["error"], False))
            continue
        if limits := TARGETS.get((row["op"], variant)):
            limit = limits[PASSES.index(row["pass"])]
            cycles = row["kernel_cycles"]
            claim = f"{name}: at most {limit} static cycles per token and head in kernels"
            megabytes = row["unestimated_bytes"] / 1e6
            text = (
                f"{cycles:.2f} (XLA beside: {row['xla_cycles']:.2f}, and {megabytes:.0f} MB moved "
                "without estimate)"
            )
            verdicts.append(report.Target(claim, text, cycles <= limit))
        spilled = [
            f"{k['name']} {k['spills']}, which cost {100 * k['spill_share']:.1f}% of its bundles"
            for k in row["kernels"]
            if k["spills"]
        ]
        claim = f"{name}: no spills in the loop body"
        verdicts.append(report.Target(claim, "; ".join(spilled) or "none", not spilled))
        if row["pass"] == "forward" and row["hbm_ratio"] is not None:
            claim = f"{name}: HBM traffic within 1.3x of inputs and outputs once"
            verdicts.append(
                report.Target(claim, f"{row['hbm_ratio']:.2f}", row["hbm_ratio"] <= 1.3)
            )
    return verdicts


def check_topologies(names: list[str]) -> None:
    """Raises ValueError before anything is compiled: with the choices, or without libtpu."""
    try:
        for name in names:
            tpu_compile.devices(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


def known_shapes(ops, shapes, besides: str = "") -> dict[str, tuple[str, ...]]:
    """Returns the shapes of each operator. Raises ValueError for one of `shapes` that none has."""
    known = {op: ("target", *operators.CASES[op].shapes) for op in ops}
    for shape in shapes:
        if not any(shape in names for names in known.values()):
            choices = "; ".join(f"{op}: {', '.join(names)}" for op, names in known.items())
            raise ValueError(f"--shape: unknown {shape!r}; choose {besides}of {choices}")
    return known
