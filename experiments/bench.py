"""Measures: operators, peers, what kernels cost as compiled, and linearizations.

    python -m experiments.bench --op=delta_rule                   operators, generation,
      compilation; --tune: block sizes
    python -m experiments.bench tpu_report                        TPU kernels as compiled, without a
      TPU
    python -m experiments.bench gpu_report                        Triton kernels as compiled,
      without a GPU
    python -m experiments.bench cpu_peers                         against transformers and
      jax-linear-attention, here
    python -m experiments.bench gpu_peers                         against flash-linear-attention, on
      a GPU
    python -m experiments.bench linearizations --teacher=...      every linearization method on one
      teacher

Each has flags of its own: `python -m experiments.bench tpu_report --help`.
"""

import importlib
import sys

COMMANDS = ("operators", "tpu_report", "gpu_report", "cpu_peers", "gpu_peers", "linearizations")


def main() -> None:
    """Runs the command that is named first; without a name, `operators`."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else COMMANDS[0]
    if name not in COMMANDS:
        sys.exit(f"error: unknown benchmark {name!r}; choose one of {', '.join(COMMANDS)}")
    # Imported only now: each command defines flags of its own, and some set what JAX reads when it
    # is imported.
    command = importlib.import_module(f"experiments.benchmarks.commands.{name}")
    from absl import flags

    from experiments.launch import cli

    flags.adopt_module_key_flags(command)  # so that --help lists them
    cli.run(command.main, config_from=None)


if __name__ == "__main__":
    main()
