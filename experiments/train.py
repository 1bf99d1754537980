"""Trains a language model, or a model of a synthetic task, as a config describes it.

    python -m experiments.train --config=configs/quickstart.py
    python -m experiments.train --config=configs/quickstart.py:smoke --config.train.steps=20

Everything is written into --workdir. The same command with the same --workdir goes on from the last
checkpoint, with another data.batch_size too. If the text has changed it refuses, unless --new_data
begins the new text at its start. On many hosts the same command runs on each, with a --workdir that
all share: see docs/launching.md.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments.launch import cli
from experiments.training import loop, run_record, summary

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/<name>.py[:argument]")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where everything is written; default: runs/<config>-<time>"
)
_RESUME = flags.DEFINE_bool(
    "resume", False, "refuse to start anew: --workdir must hold a checkpoint"
)
_NEW_DATA = flags.DEFINE_bool(
    "new_data", False, "resume with data from its start, which may be another text"
)


def main(argv):
    cli.no_arguments(argv)
    if jax.process_count() > 1 and not _WORKDIR.value:
        raise cli.UserError("several processes need one --workdir, in a folder that all share")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(_WORKDIR.value or run_record.default_workdir(path))
    if run_record.holds_linearization(workdir):
        raise cli.UserError(f"{workdir} holds a linearization; give another --workdir")
    saved = workdir / "checkpoints"
    if _RESUME.value and not any(path.name.isdigit() for path in saved.glob("*")):
        raise cli.UserError(f"--resume: {saved} holds no checkpoint")
    result = loop.train(_CONFIG.value, workdir, new_data=_NEW_DATA.value)
    if jax.process_index() == 0:
        print(summary.text(result))


if __name__ == "__main__":
    cli.run(main, many_hosts=True)
