"""Reads a trained model's parameters from a run's folder."""

from pathlib import Path

from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import Program
from seqmodels.checkpoints_io import runs


def reading_config(config):
    """Returns a copy of a run's config for binaries that only read its parameters.

    Its param_dtype is the dtype of the model's matrix products, so that restoring takes less memory
    and gives the same products. With Schedule-Free it is unchanged, as its average is computed
    first.
    """
    config = config.copy_and_resolve_references()
    if "dtype" in config.model and config.optimizer.name != "schedule_free":
        with config.unlocked():
            config.model.param_dtype = config.model.dtype
    return config


def evaluation_params(program: Program, config, workdir: Path, step: int | None = None):
    """Returns (step, what to evaluate and sample with) from a run's checkpoint.

    The latter is what `Program.evaluation_params` returns.

    program: of `steps.build`, which says how the parameters are laid out.
    step: which checkpoint to read; None is the latest.
    Raises ValueError if there is no such checkpoint, or it is of another model.
    """
    checkpoints = Checkpoints(workdir, training=False)
    step = runs.chosen_step(checkpoints.directory, checkpoints.steps(), step)
    # Only Schedule-Free keeps a part of them in the optimizer's state.
    names = ["params"]
    names += ["training"] * (config.optimizer.name == "schedule_free")
    names += ["collections"] * bool(program.abstract_state.collections)
    parts = checkpoints.restore_parts(step, program.abstract_state, tuple(names))
    checkpoints.close()
    further = parts.get("collections", {})
    if "training" in parts:
        opt_state = parts["training"]["opt_state"]
        return step, program.evaluation_params(parts["params"], opt_state, further)
    return step, {"params": parts["params"], **further} if further else parts["params"]
