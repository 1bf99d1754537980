"""Plans a training run on TPUs that are not there: memory, collectives, and estimated time.

    python -m experiments.plan --config=configs/gated_delta_net_1300m.py --topology=v5p:4x4x8 \
        --mesh=data=8,fsdp=16
    python -m experiments.plan --config=configs/delta_net_340m.py --topology=v6e:4x4 --sweep \
        --batch_size=256,512
    python -m experiments.plan --config=configs/delta_net_340m.py --mesh=seq=-1 \
        --topology=v5p:2x2x1,v5p:2x4x4,v5p:4x4x8 --tokens_per_device=32768 \
        --collective=all_gather,all_scan,ring

Compiles the program that train runs, for every combination of --topology, --mesh, --collective and
--batch_size, through libtpu (pip install -e '.[train,tpu]'). Nothing is run, and no accelerator is
needed; a compilation takes a minute or more of one core, whatever the slice. Prints each plan, then
all of them, the fastest first, and writes plan.json, tables.md and pictures into --out, beside
those of other calls. Fields of the config are overridden as in train: --config.data.seq_len=131072.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; nothing runs on a TPU

import itertools
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.benchmarks.report import text_table
from experiments.launch import cli
from experiments.planning import candidates, compiled, parts, report
from kernels_pallas.tools import tpu_compile
from seqmodels import sharding

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/<name>.py[:argument]")
_TOPOLOGY = flags.DEFINE_list("topology", None, "slices to compile for: v5p:4x4x8, v6e:16x16")
_MESH = flags.DEFINE_multi_string(
    "mesh", [], "data=8,fsdp=16, one of them -1 for what is left; repeatable; else the config's"
)
_COLLECTIVE = flags.DEFINE_list(
    "collective", [], f"of states along seq: {', '.join(sharding.COLLECTIVES)}; else the config's"
)
_BATCH = flags.DEFINE_list("batch_size", [], "rows of the global batch; else the config's")
_TOKENS = flags.DEFINE_integer(
    "tokens_per_device", None, "tokens of the batch on each device: sets rows and length", 1
)
_SWEEP = flags.DEFINE_bool("sweep", False, "compare meshes of the slice with each --batch_size")
_OUT = flags.DEFINE_string("out", None, "folder for plan.json, tables.md and pictures; else none")


def main(argv):
    cli.no_arguments(argv)
    try:
        tpu_compile.without_listings()
    except ImportError as error:
        raise cli.UserError(str(error)) from error
    chosen, left_out = _candidates()
    if _OUT.value:
        cli.output_folder(_OUT.value)
    print(report.NOTE, *(f"not compiled: {why}" for why in left_out), sep="\n")
    rows = []
    command = shlex.join(["python", "-m", "experiments.plan", *sys.argv[1:]])
    for candidate in chosen:
        rows.append(compiled.plan(candidate))
        print(f"\n{report.text(rows[-1])}", flush=True)
        if _OUT.value:
            report.save(Path(_OUT.value), command, rows, left_out)
    ranked = sorted(rows, key=report.rank)
    print(f"\n{text_table([report.line(row) for row in ranked])}")


def _candidates() -> tuple[list[candidates.Candidate], list[str]]:
    """Returns the candidates to compile, and texts on what `--sweep` left out; bad flags raise."""
    if not _TOPOLOGY.value:
        known = "; ".join(f"{part}: {', '.join(shapes)}" for part, shapes in parts.KNOWN.items())
        raise cli.UserError(f"give a slice: --topology=v5p:4x4x8. There are {known}")
    if _SWEEP.value and (_MESH.value or _TOKENS.value or _COLLECTIVE.value):
        raise cli.UserError(
            "--sweep chooses the meshes: leave --mesh, --collective and --tokens_per_device out"
        )
    if _TOKENS.value and _BATCH.value:
        raise cli.UserError("--tokens_per_device gives the rows: leave --batch_size out")
    meshes = [candidates.parse_mesh(text) for text in _MESH.value] or [None]
    batches = cli.numbers("batch_size", _BATCH.value) or [None]
    config = candidates.resolve(_CONFIG.value)
    chosen, left_out = [], []
    for where in [parts.find(topology) for topology in _TOPOLOGY.value]:
        if _SWEEP.value:
            rows = [batch or config.data.batch_size for batch in batches]
            more, why = candidates.sweep(config, where, rows)
            chosen, left_out = chosen + more, left_out + why
            continue
        choices = itertools.product(meshes, _COLLECTIVE.value or [None], batches)
        chosen += [candidates.make(config, where, *choice, _TOKENS.value) for choice in choices]
    return chosen, left_out


if __name__ == "__main__":
    cli.run(main)
