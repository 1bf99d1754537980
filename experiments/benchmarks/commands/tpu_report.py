"""Reports what each TPU kernel costs as compiled, on a machine without a TPU; nothing is run.

    python -m experiments.bench tpu_report     (every kernel on v6e at the targets' shape)
    python -m experiments.bench tpu_report --op=delta_rule --topology=v5e,v6e:2x2,tpu7x
    python -m experiments.bench tpu_report --implementation=pallas_tpu
    python -m experiments.bench tpu_report --op=diagonal_scan --shape=rg_lru_2b --dtype=float32

Compiles each operator's kernels and its chunked XLA form, forward and with backward, through libtpu
(pip install -e '.[train,tpu]'). Prints for each kernel its grid, VLIW bundles in the loop body,
static cycles, use of the matrix unit and of the load and store slots, spills, VMEM, and HBM bytes
moved against the least possible. Results go to kernels_pallas/reports/tpu as JSON and a table, in
place of older ones of the same kernels, so that a slower kernel shows in a diff.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; nothing runs on a TPU

from absl import flags

from experiments.benchmarks import report, static_cost
from experiments.launch import cli

_OP = flags.DEFINE_list("op", ["all"], f"any of {', '.join(static_cost.OPS)}, or all")
_TOPOLOGY = flags.DEFINE_list("topology", ["v6e:2x2"], "parts (v5e, v5p, v6e, tpu7x) or slices")
_SHAPE = flags.DEFINE_list(
    "shape", ["target"], "target, names from kernels_pallas/<op>/shapes.py, or all"
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "of the operators' inputs")
_IMPLEMENTATIONS = flags.DEFINE_multi_enum(
    "implementation",
    list(static_cost.IMPLEMENTATIONS),
    static_cost.IMPLEMENTATIONS,
    "may be given several times. XLA's, chunked and shifted, take longest to compile",
)
_OUT = flags.DEFINE_string("out", str(static_cost.FOLDER), "folder for results")


def main(argv):
    cli.no_arguments(argv)
    runs = _runs()  # all mistakes are found before anything is compiled
    out = cli.output_folder(_OUT.value)
    print(static_cost.NOTE, flush=True)
    found = []
    for op, shape, topology in runs:
        chosen = _IMPLEMENTATIONS.value
        for row in static_cost.rows(op, shape, topology, _DTYPE.value, chosen):
            found.append(row)
            print(report.text_table([{"op": op} | static_cost.program_line(row)]), flush=True)
            if lines := static_cost.kernel_lines(row):
                print(report.text_table(lines), flush=True)
            print()
        static_cost.save(out, found)
    print(report.targets_text(static_cost.targets(found)))
    print(f"results: {_OUT.value}")


def _runs() -> list[tuple[str, str, str]]:
    """Returns each (operator, shape, topology) of the flags; raises ValueError for unknown
    names."""
    ops = cli.chosen("op", _OP.value, static_cost.OPS, every="all")
    shapes = [shape for shape in _SHAPE.value if shape != "all"]
    known = static_cost.known_shapes(ops, shapes, besides="all, or ")
    static_cost.check_topologies(_TOPOLOGY.value)
    return [
        (op, shape, topology)
        for op in ops
        for shape in known[op]
        if shape in _SHAPE.value or _SHAPE.value == ["all"]
        for topology in _TOPOLOGY.value
    ]
