"""Calls `experiments.train` as users do, within this process."""

import sys
from pathlib import Path
from unittest import mock

from absl import flags

from experiments import train
from experiments.launch import cli

CONFIGS = Path(__file__).parents[2] / "configs"


def read(config, *arguments):
    """Returns the config that the binary reads from --config=configs/<config> and `arguments`."""
    argv = ["train", f"--config={CONFIGS / config}", *arguments]
    with mock.patch.object(sys, "argv", argv):  # where ml_collections looks for overrides
        try:
            cli.parse_flags(argv)
        finally:
            for name in [name for name in flags.FLAGS if name.startswith("config.")]:
                delattr(flags.FLAGS, name)  # each call defines those that it is given
    return flags.FLAGS.config


def run(config, workdir, *arguments):
    """Runs the binary, whose results are in `workdir`."""
    read(config, f"--workdir={workdir}", *arguments)
    train.main(["train"])
