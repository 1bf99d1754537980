"""Writes metrics to metrics.jsonl, TensorBoard and Weights & Biases, and shows them in training."""

import hashlib
import importlib
import json
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from experiments.launch import distributed
from experiments.training import run_record

FILE_NAME = "metrics.jsonl"


class MetricWriter:
    """Writes named numbers to metrics.jsonl, TensorBoard and Weights & Biases, from process 0.

    config: its fields `tensorboard` (bool) and `wandb` (a project's name, or "") turn those two on.
    start_step: the step from which a run resumes. Rows after it are dropped from metrics.jsonl, as
      they were written past the last checkpoint; so are test scores of an earlier end.
    Raises ValueError if a package is missing (naming the extra) or Weights & Biases has no key.
    """

    def __init__(self, config, workdir: Path, start_step: int = 0):
        self._file = self._tensorboard = self._wandb = None
        if jax.process_index():
            return
        tensorboardX = _import_extra("tensorboardX", "tensorboard") if config.tensorboard else None
        wandb = _import_extra("wandb", "wandb") if config.wandb else None
        if wandb:
            self._wandb = _start_wandb(wandb, config, workdir)
        path = workdir / FILE_NAME
        rows = read_metrics(workdir)
        kept = [row for row in rows if row["step"] <= start_step and "test_loss" not in row]
        run_record.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        if tensorboardX:
            self._tensorboard = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, step: int, **values: float) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(wandb, config, workdir: Path):
    run_id = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    try:
        return wandb.init(
            project=config.wandb,
            name=workdir.name,
            dir=str(workdir),
            config=config.to_dict(),
            id=run_id,
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(
            f"config.wandb is {config.wandb!r}, and Weights & Biases does not start: {error}. Log "
            "in first (wandb login, or WANDB_API_KEY in the environment), keep it on this machine "
            "(WANDB_MODE=offline), or leave config.wandb empty"
        ) from error


def read_metrics(workdir: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl, without an incomplete last line."""
    path = Path(workdir) / FILE_NAME
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def has_validation(workdir: Path, step: int) -> bool:
    """Returns whether a run's metrics.jsonl has a score of the validation split at this step."""
    rows = read_metrics(workdir)
    return any(row["step"] == step and "validation_loss" in row for row in rows)


def _import_extra(package: str, extra: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"config.{extra} needs the package {package}, which is not installed: pip install "
            f"'.[{extra}]'"
        ) from error


class Progress:
    """Shows training as a progress bar on a terminal, else as log lines; on process 0."""

    def __init__(self, start_step: int, steps: int):
        self._steps = steps
        self._bar = None
        self._quiet = jax.process_index() != 0
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True)

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, **values: float) -> None:
        """Shows current numbers, such as the loss, beside the bar or as a line of their own."""
        if self._quiet:
            return
        text = ", ".join(
            f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items()
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self._steps}: {text}")

    def say(self, text: str) -> None:
        """Prints a line of text above the bar, or with the time of day where there is no bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(
                f"{time.strftime('%H:%M:%S')} {distributed.label()}{text}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
