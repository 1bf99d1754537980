"""Reads the parameters of a trained model from the folder of its run."""

from pathlib import Path

from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import Program
from seqmodels.checkpoints_io import runs


def reading_config(config):
    """Returns a copy of a run's config for binaries that only read its parameters.

    Parameters are restored in the dtype in which they are multiplied: the same numbers in less
    memory. Those of Schedule-Free are computed from what is restored, and keep their dtype.
    """
    config = config.copy_and_resolve_references()
    if "dtype" in config.model and config.optimizer.name != "schedule_free":
        with config.unlocked():
            config.model.param_dtype = config.model.dtype
    return config


def evaluation_params(program: Program, config, workdir: Path, step: int | None = None):
    """Returns (step, parameters to evaluate and sample with) of a run's checkpoint.

    step: of the checkpoint; None is the latest.
    Raises ValueError where there is no such checkpoint, or it is of another model.
    """
    checkpoints = Checkpoints(workdir, training=False)
    step = runs.chosen_step(checkpoints.directory, checkpoints.steps(), step)
    # Only Schedule-Free keeps a part of them in the optimizer's state.
    names = ("params", "training") if config.optimizer.name == "schedule_free" else ("params",)
    parts = checkpoints.restore_parts(step, program.abstract_state, names)
    checkpoints.close()
    if "training" in parts:
        return step, program.evaluation_params(parts["params"], parts["training"]["opt_state"])
    return step, parts["params"]
