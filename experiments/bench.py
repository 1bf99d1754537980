"""Measures operators and their peers, compiled kernels, and linearizations.

    python -m experiments.bench --op=delta_rule   operators, generation, compilation
    python -m experiments.bench tune              chunk and block sizes, into the operators' table
    python -m experiments.bench tpu_report        TPU kernels as compiled, without a TPU
    python -m experiments.bench gpu_report        Triton kernels as compiled, without a GPU
    python -m experiments.bench cpu_peers         against transformers and jax-linear-attention
    python -m experiments.bench gpu_peers         against flash-linear-attention, on a GPU
    python -m experiments.bench linearizations    every linearization method on one teacher
    python -m experiments.bench vision            digits by every mixer, one table of accuracies
    python -m experiments.bench lengths           linear against softmax attention, 64 to 16,384

Each has flags of its own: `python -m experiments.bench tpu_report --help`.
"""

import sys

# Commands are imported when they are chosen: each defines flags of its own, and some set what JAX
# reads when it is imported.


def _operators():
    from experiments.benchmarks.commands import operators

    return operators, operators.main


def _tune():
    from experiments.benchmarks.commands import operators

    return operators, operators.tune_main


def _tpu_report():
    from experiments.benchmarks.commands import tpu_report

    return tpu_report, tpu_report.main


def _gpu_report():
    from experiments.benchmarks.commands import gpu_report

    return gpu_report, gpu_report.main


def _cpu_peers():
    from experiments.benchmarks.commands import cpu_peers

    return cpu_peers, cpu_peers.main


def _gpu_peers():
    from experiments.benchmarks.commands import gpu_peers

    return gpu_peers, gpu_peers.main


def _linearizations():
    from experiments.benchmarks.commands import linearizations

    return linearizations, linearizations.main


def _vision():
    from experiments.benchmarks.commands import vision

    return vision, vision.main


def _lengths():
    from experiments.benchmarks.commands import lengths

    return lengths, lengths.main


COMMANDS = {
    "operators": _operators,
    "tune": _tune,
    "tpu_report": _tpu_report,
    "gpu_report": _gpu_report,
    "cpu_peers": _cpu_peers,
    "gpu_peers": _gpu_peers,
    "linearizations": _linearizations,
    "vision": _vision,
    "lengths": _lengths,
}


def main() -> None:
    """Runs the benchmark named by the first argument; without a name, `operators`."""
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    name = sys.argv.pop(1) if named else "operators"
    if name not in COMMANDS:
        sys.exit(f"error: unknown benchmark {name!r}; choose one of {', '.join(COMMANDS)}")
    module, command = COMMANDS[name]()
    from absl import flags

    from experiments.launch import cli

    flags.adopt_module_key_flags(module)  # so that --help lists them
    cli.run(command, config_from=None)


if __name__ == "__main__":
    main()
