"""Reports what each Triton kernel costs as compiled, on a machine without a GPU; nothing is run.

    python -m experiments.bench gpu_report     (every kernel at the targets' shape, bfloat16)
    python -m experiments.bench gpu_report --op=delta_rule --target=90 --dtype=float32
    python -m experiments.bench gpu_report --op=linear_attention --shape=mamba2_2.7b

Compiles each operator's kernels, forward and backward, for sm_80, sm_90 and sm_100 (pip install -e
'.[triton]'). Prints for each its grid, warps, registers and spilled bytes per thread, shared memory
per program, and bytes moved against the least possible. Results go to
kernels_pallas/reports/gpu/triton.json and triton.md, in place of older ones of the same programs,
so that a kernel that begins to spill shows in a diff.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from absl import flags

from experiments.benchmarks import operators, report, static_triton
from experiments.launch import cli
from kernels_pallas.gpu import launch
from kernels_pallas.tools import triton_compile

_OP = flags.DEFINE_list("op", ["all"], f"any of {', '.join(static_triton.OPS)}, or all")
_TARGET = flags.DEFINE_list("target", ["80", "90", "100"], "compute capabilities")
_SHAPE = flags.DEFINE_string(
    "shape", "target", "target, or a name from kernels_pallas/<op>/shapes.py"
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "of the operators' inputs")
_OUT = flags.DEFINE_string("out", str(static_triton.FOLDER), "folder for results")


def main(argv):
    cli.no_arguments(argv)
    ops = cli.chosen("op", _OP.value, static_triton.OPS, every="all")
    for op in ops:
        known = ("target", *operators.CASES[op].shapes)
        if _SHAPE.value not in known:
            raise cli.UserError(f"--shape: unknown {_SHAPE.value!r}; choose of {', '.join(known)}")
    targets = cli.chosen("target", _TARGET.value, [str(c) for c in triton_compile.CAPABILITIES])
    with launch.recorded():
        if reason := launch.unsupported_reason():
            raise cli.UserError(reason)
    out = cli.output_folder(_OUT.value)
    print(static_triton.NOTE, flush=True)
    for op in ops:
        for target in map(int, targets):
            rows = static_triton.rows(op, _SHAPE.value, _DTYPE.value, (target,))
            print(f"\n{op}")
            print(report.text_table([static_triton.line(row) for row in rows]), flush=True)
            static_triton.save(out, rows)
    print(f"results: {_OUT.value}")
