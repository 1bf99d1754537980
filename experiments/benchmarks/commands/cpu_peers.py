"""Times the chunked forms against transformers' and jax-linear-attention's on this machine's CPU.

    pip install -e '.[oracles]'
    python -m experiments.bench cpu_peers
    python -m experiments.bench cpu_peers --only='Gated DeltaNet' --length=4096 --rounds=9
    python -m experiments.bench cpu_peers --parts=memory

Each side is checked against the float64 recurrence first, warmed up, and timed in turn, many times,
in one process. A peer that is not installed is 'not run': jax-linear-attention needs an interpreter
of its own (Python >= 3.12, and the JAX that it pins). Memory is that of T 65536, each in a fresh
process. Figures go to <peer>.json in --out, with the hardware and the versions, and to tables.md,
in place of those peers' older ones. Exit code 1 if a result was wrong.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

from absl import flags

from experiments.benchmarks import cpu_peers, report
from experiments.launch import cli

_DEFAULTS = cpu_peers.Settings()
_PARTS = {"timing": cpu_peers.compare, "memory": cpu_peers.memory}
_ONLY = flags.DEFINE_list("only", list(cpu_peers.NAMES), f"any of {', '.join(cpu_peers.NAMES)}")
_WHICH = flags.DEFINE_list("parts", ["timing"], f"any of {', '.join(_PARTS)}")
_SIZES = {
    letter: flags.DEFINE_integer(name, getattr(cpu_peers.SHAPE, letter), letter, lower_bound=1)
    for letter, name in {"B": "batch", "H": "heads", "K": "key_dim", "V": "value_dim"}.items()
}
_LENGTH = flags.DEFINE_integer("length", _DEFAULTS.length, "T of the times", lower_bound=1)
_MEMORY_LENGTH = flags.DEFINE_integer(
    "memory_length", _DEFAULTS.memory_length, "T of the memory", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "of q, k and v")
_ROUNDS = flags.DEFINE_integer("rounds", _DEFAULTS.rounds, "of each program", lower_bound=3)
_OUT = flags.DEFINE_string("out", str(cpu_peers.FOLDER), "folder for results")


def main(argv):
    cli.no_arguments(argv)
    names = cli.chosen("only", _ONLY.value, cpu_peers.NAMES)
    parts = cli.chosen("parts", _WHICH.value, tuple(_PARTS))
    settings = dataclasses.replace(
        _DEFAULTS,
        shape=dataclasses.replace(
            _DEFAULTS.shape, **{letter: flag.value for letter, flag in _SIZES.items()}
        ),
        length=_LENGTH.value,
        memory_length=_MEMORY_LENGTH.value,
        dtype=_DTYPE.value,
        rounds=_ROUNDS.value,
    )
    out = cli.output_folder(_OUT.value)
    found = {}
    for part in parts:
        found[part] = []
        for name in names:
            found[part] += _PARTS[part](name, settings)
            cpu_peers.save(out, found)  # what is cut short keeps what it has
    timed = found.get("timing", [])
    if timed:
        print(report.text_table([cpu_peers.line(row) for row in timed]))
        print(report.targets_text(cpu_peers.targets(timed)))
    print(f"results: {_OUT.value}")
    return 1 if any("WRONG" in v for row in timed for v in row["verdicts"].values()) else 0
