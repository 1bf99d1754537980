"""Times the Triton kernels against flash-linear-attention and mlstm_kernels on the GPU at hand.

    pip install -e '.[cuda,triton,peers]'
    python -m experiments.bench gpu_peers
    python -m experiments.bench gpu_peers --only='GLA,Gated DeltaNet' --lengths=2048,65536

At 65,536 tokens in all, 16 heads, K = V = 128, bfloat16: each side is checked against the float64
recurrence first, warmed up, and timed in turn, many times, in one process; cuDNN attention at the
same sizes beside them. Writes gpu_peers.json and gpu_peers.md into --out, with the hardware and the
versions. Without a GPU the table says "not run".
"""

import os

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # the peers' torch needs memory, too

import jax
from absl import flags

from experiments.benchmarks import gpu_peers, report, static_triton
from experiments.launch import cli

_NAMES = [comparison.name for comparison in gpu_peers.COMPARISONS]
_ONLY = flags.DEFINE_list("only", _NAMES, f"any of {', '.join(_NAMES)}")
_LENGTHS = flags.DEFINE_list("lengths", [str(T) for T in gpu_peers.LENGTHS], "T")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "measurements of each program", lower_bound=3)
_OUT = flags.DEFINE_string("out", str(static_triton.FOLDER), "folder for results")


def main(argv):
    cli.no_arguments(argv)
    names = cli.chosen("only", _ONLY.value, _NAMES)
    lengths = cli.numbers("lengths", _LENGTHS.value)
    out = cli.output_folder(_OUT.value)
    chosen = [c for c in gpu_peers.COMPARISONS if c.name in names]
    rows = []
    for comparison in chosen:
        if jax.default_backend() == "gpu":
            rows += gpu_peers.measure(comparison, lengths, _ROUNDS.value)
        else:
            rows += gpu_peers.not_run(comparison, lengths)
    print(report.text_table([gpu_peers.line(row) for row in rows]))
    print("\n".join(gpu_peers.crossings(rows)))
    gpu_peers.save(out, rows)
    print(f"results: {_OUT.value}")
