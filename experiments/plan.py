"""Plans a training run on TPUs that are not there: memory, traffic, collectives and an estimate of
time, from the compiled step.

    python -m experiments.plan --config=configs/gated_delta_net_1300m.py --topology=v5p:4x4x8
    --mesh=data=8,fsdp=16 python -m experiments.plan --config=configs/delta_net_340m.py
    --topology=v6e:4x4 --sweep --batch_size=256,512 python -m experiments.plan
    --config=configs/delta_net_340m.py --topology=v5p:2x2x1,v5p:2x4x4,v5p:4x4x8 --mesh=seq=-1 \
        --tokens_per_device=32768 --collective=all_gather,all_scan,ring

Compiles the program that train runs, for every combination of --topology, --mesh, --collective and
--batch_size, through libtpu (pip install -e '.[tpu]'); nothing is run, and no accelerator is
needed. A compilation takes about a minute or more of one core, whatever the slice. Prints each
plan, then all of them, the fastest first, and writes plan.json, tables.md and pictures into --out,
beside what other calls have put there. Fields of the config are overridden as in train:
--config.data.seq_len=131072.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; nothing runs on a TPU

import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.benchmarks.report import text_table
from experiments.launch import cli
from experiments.planning import cases, compiled, parts, report
from kernels_pallas.tools import tpu_compile
from seqmodels import sharding

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/<name>.py[:argument]")
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "slices to compile for, such as v5p:4x4x8 or v6e:16x16"
)
_MESH = flags.DEFINE_multi_string(
    "mesh",
    [],
    "such as data=8,fsdp=16, one of them -1 for what is left; the config's without it. Repeat it for more",
)
_COLLECTIVE = flags.DEFINE_list(
    "collective",
    [],
    f"of states along seq: {', '.join(sharding.COLLECTIVES)}; the config's without it",
)
_BATCH = flags.DEFINE_list("batch_size", [], "rows of the global batch; the config's without it")
_TOKENS = flags.DEFINE_integer(
    "tokens_per_device",
    None,
    "make rows so many, and so long, that each device has that many tokens of the batch",
    lower_bound=1,
)
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "compare meshes of the slice, and every --batch_size, and rank them"
)
_OUT = flags.DEFINE_string(
    "out", None, "folder for plan.json, tables.md and pictures; default: nothing is kept"
)


def main(argv):
    cli.no_arguments(argv)
    try:
        tpu_compile.without_listings()
    except ImportError as error:
        raise cli.UserError(str(error)) from error
    chosen, left_out = _cases()  # all mistakes are found before anything is compiled
    if _OUT.value:
        cli.output_folder(_OUT.value)
    print(report.NOTE, *(f"not compiled: {why}" for why in left_out), sep="\n")
    rows = []
    for case in chosen:
        row = compiled.plan(case)
        rows.append(row)
        print(f"\n{report.text(row)}", flush=True)
        if _OUT.value:
            report.save(
                Path(_OUT.value),
                shlex.join(["python", "-m", "experiments.plan", *sys.argv[1:]]),
                rows,
                left_out,
            )
    ranked = sorted(rows, key=report.rank)
    print(f"\n{text_table([report.line(row) for row in ranked])}")


def _cases() -> tuple[list[cases.Case], list[str]]:
    if not _TOPOLOGY.value:
        known = "; ".join(f"{part}: {', '.join(shapes)}" for part, shapes in parts.KNOWN.items())
        raise cli.UserError(f"give a slice: --topology=v5p:4x4x8. There are {known}")
    if _SWEEP.value and (_MESH.value or _TOKENS.value or _COLLECTIVE.value):
        raise cli.UserError(
            "--sweep chooses the meshes itself: leave --mesh, --collective and --tokens_per_device out"
        )
    if _TOKENS.value and _BATCH.value:
        raise cli.UserError(
            "--tokens_per_device says how many rows there are: leave --batch_size out"
        )
    meshes = [cases.parse_mesh(text) for text in _MESH.value] or [None]
    batches = cli.numbers("batch_size", _BATCH.value) or [None]
    config = cases.resolve(_CONFIG.value)
    chosen, left_out = [], []
    for where in [parts.find(topology) for topology in _TOPOLOGY.value]:
        if _SWEEP.value:
            more, why = cases.sweep(config, where, [b or config.data.batch_size for b in batches])
            chosen, left_out = chosen + more, left_out + why
            continue
        chosen += [
            cases.make(config, where, mesh, collective, batch, _TOKENS.value)
            for mesh in meshes
            for collective in _COLLECTIVE.value or [None]
            for batch in batches
        ]
    return chosen, left_out


if __name__ == "__main__":
    cli.run(main)
