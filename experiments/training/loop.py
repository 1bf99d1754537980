"""Trains a model: `train` is the whole loop, with its stop signals and its clock beside it."""

import contextlib
import math
import os
import signal
import threading
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments.data import make_dataset
from experiments.launch import distributed
from experiments.launch.cli import NonFiniteLoss, Stopped
from experiments.training import evaluation, metrics, run_record, steps, summary
from experiments.training.checkpoints import Checkpoints
from kernels_pallas import dispatch
from seqmodels import models, sharding
from seqmodels.text import tokenizers


def train(
    config, workdir: str | Path, devices=None, make_task=None, new_data: bool = False
) -> dict:
    """Trains the model that `config` describes (configs/common.py); returns the final scores.

    They are also written to workdir/result.json. If the workdir holds checkpoints, training goes on
    from the latest.

    devices: the devices to train on; None is all.
    make_task: (resolved config, seq_len) -> steps.Task; None trains all parameters of the config's
      model.
    new_data: whether a resumed run reads its data from the start; they may be other data.

    Raises:
      ValueError: the config has a mistake, or the workdir's checkpoint is of another model. Nothing
        was written.
      NonFiniteLoss: a loss, gradient or parameter was not finite. That state was not saved.
      SaveFailed: a checkpoint could not be written. Earlier ones are intact.
      Stopped: SIGTERM or Ctrl-C came. The state was saved.
    """
    workdir = Path(workdir)

    # Build data, model and step first: a mistake in the config is found before anything is written.
    check_counts(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    share = distributed.data_share(sharding.batch_sharding(mesh))
    train_set, validation_set, test_set = (
        make_dataset(config.data, split, process_index=share.index, process_count=share.count)
        for split in ("train", "validation", "test")
    )
    seq_len = next(iter(train_set))["inputs"].shape[1]
    config = resolve(config, train_set)
    distributed.agree(run_record.checksum(config), "their configs (checksums)")
    task = None if make_task is None else make_task(config, seq_len)
    program = steps.build(config, seq_len, devices, task)
    summary.check_sample(config, program.model, test_set.tokenizer)
    batches = iter(train_set)

    # Take the state from the latest checkpoint, or initialize it.
    distributed.check_shared(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, share=share)
    saved = checkpoints.latest_step()
    saved = distributed.agree(-1 if saved is None else saved, "the latest checkpoint they see")
    start = max(saved, 0)
    if saved > 0:
        state = checkpoints.restore(start, program.abstract_state, None if new_data else batches)
    elif saved == 0:  # written by `convert`: weights alone, for any data and optimizer
        parts = checkpoints.restore_parts(0, program.abstract_state, ("params",))
        state = program.init(config.seed, parts["params"])
    else:
        state = program.init(config.seed)
    scored = distributed.told_by_first(metrics.has_validation(workdir, start))

    # Record the start, on process 0, and say what is trained.
    writer = metrics.MetricWriter(config, workdir, start)
    progress = metrics.Progress(start, config.train.steps)
    changes = []
    if jax.process_index() == 0:
        changes = run_record.save_config(workdir, config)
        run_record.record_start(workdir, start, changes)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    progress.say(
        f"{num_params:,} parameters, {program.num_devices} x {jax.devices()[0].device_kind}, "
        f"{workdir}"
    )
    if saved >= 0:
        progress.say(f"{'resuming' if start else 'starting'} from {checkpoints.path(start)}")
    for change in changes:
        progress.say(f"changed since this run was started: {change}")

    tokens_per_step = config.data.batch_size * seq_len
    clock = Clock()

    def report(step: int, on_device: dict) -> None:
        """Waits for a step's metrics and logs them. Raises NonFiniteLoss if one is not finite."""
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteLoss(
                summary.non_finite(step, values, checkpoints, program.schedule(step - 1))
            )
        progress.step(step)
        if step == start + 1:
            clock.start(step)
        if step % config.train.log_every == 0 or step == config.train.steps:
            speed = clock.speed(step, tokens_per_step)
            rate = float(program.schedule(step - 1))
            writer.write(step, **values, learning_rate=rate, **speed)
            progress.show(step, loss=values["loss"], **speed)

    def validate(step: int) -> None:
        with clock.paused():
            params = program.evaluation_params(state.params, state.opt_state, state.collections)
            scores = evaluation.evaluate(
                program, params, validation_set, config.train.eval_batches
            ).totals()
            writer.write(step, **{f"validation_{name}": value for name, value in scores.items()})
            progress.say(f"step {step}: validation loss {scores['loss']:.4f}")

    def due(step: int) -> bool:
        return step == config.train.steps or step % config.train.eval_every == 0

    pending = None  # the last step and its metrics, which are read once the next step is dispatched
    with contextlib.closing(progress), contextlib.closing(writer):
        if saved > 0 and due(start) and not scored:  # the run ended between saving and scoring
            validate(start)
        with StopSignals() as stop, contextlib.closing(checkpoints):
            for step in range(start + 1, config.train.steps + 1):
                with dispatch.recorded() as choices:  # the first step is traced, and no other
                    state, step_metrics = program.train_step(state, program.put(next(batches)))
                for choice in choices:
                    progress.say(str(choice))
                if pending:
                    report(*pending)
                pending = (step, step_metrics)
                checkpoints.poll()

                # Save and score where that is due; stop, after saving, where a signal came.
                last = step == config.train.steps
                stopping = stop.requested(step)
                saving = last or stopping or step % config.checkpoint.every == 0
                validating = due(step)
                if saving or validating:
                    report(*pending)  # a state is saved once it is known to be finite
                    pending = None
                if saving:
                    checkpoints.save(state, batches)
                if stopping:
                    checkpoints.wait()
                    progress.say(f"{stop.name}: step {step} is saved in {checkpoints.path(step)}")
                    raise Stopped(128 + stop.signal)
                if validating:
                    validate(step)

        # Score the test split, and write the summary.
        params = program.evaluation_params(state.params, state.opt_state, state.collections)
        scores = evaluation.evaluate(program, params, test_set, config.train.test_batches).totals()
        step = max(start, config.train.steps)
        writer.write(step, **{f"test_{name}": value for name, value in scores.items()})
    result = scores | {"steps": step, "parameters": num_params}
    params = program.model_params(params)
    return summary.finish(config, workdir, result, program.model, params, test_set.tokenizer)


def check_counts(config) -> None:
    """Raises ValueError for numbers in a config (steps, intervals, batches) below their minimum."""
    for least, names in (
        (1, ("train.log_every", "train.eval_every", "checkpoint.every")),
        (0, ("train.steps", "train.eval_batches", "train.test_batches")),
        (0, ("train.z_loss", "sample.length")),
    ):
        for section, name in (path.split(".") for path in names):
            if (config[section][name] or 0) < least:
                raise ValueError(
                    f"{section}.{name} is {config[section][name]}; it must be at least {least}"
                    + (", and more than train.steps for never" if least else "")
                )


def resolve(config, dataset):
    """Returns a copy of the config in which the model has the sizes of the dataset.

    A vocab_size, num_classes, input_dim or grid that is not given (0 or None) becomes the
    dataset's. Raises ValueError if the dataset has token ids that the model's vocabulary lacks, or
    other sizes than those that are given.
    """
    config = config.copy_and_resolve_references()
    own = models.fields_of(models.architecture_of(config.model))
    with config.unlocked():
        if "vocab_size" in own:
            config.model.vocab_size = _vocab_size(config.model.get("vocab_size"), dataset)
        for name in ("num_classes", "input_dim", "grid"):
            theirs = getattr(dataset, name)
            if name not in own or not theirs:
                continue
            given = config.model.get(name) or theirs
            if (math.prod(given) != math.prod(theirs)) if name == "grid" else given != theirs:
                raise ValueError(
                    f"model.{name} is {given}, but the dataset's is {theirs}; leave it out"
                )
            config.model[name] = given
    return config


def _vocab_size(given: int | None, dataset) -> int:
    size, text = given or dataset.vocab_size, dataset.tokenizer
    if size < dataset.vocab_size and not (text and tokenizers.fits(text, size)):
        raise ValueError(
            f"model.vocab_size is {size}, but the dataset has ids up to {dataset.vocab_size - 1}; "
            f"set it to 0 (the dataset's {dataset.vocab_size}) or more than that"
        )
    return size


class Clock:
    """Measures tokens per second between calls of `speed`, without compilation and pauses."""

    def __init__(self):
        self._start = self._step = None

    def start(self, step: int) -> None:
        """Starts the clock after training step `step`, the first, which compiles."""
        self._start, self._step = time.perf_counter(), step

    def speed(self, step: int, tokens_per_step: int) -> dict[str, float]:
        now = time.perf_counter()
        steps, seconds = step - self._step, now - self._start
        self._start, self._step = now, step
        return {"tokens_per_second": steps * tokens_per_step / seconds} if steps else {}

    @contextlib.contextmanager
    def paused(self):
        before = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - before


class StopSignals:
    """Context manager: records SIGTERM and Ctrl-C, which then do not end the process.

    A second signal does. `requested` says whether one came. With several processes JAX listens for
    SIGTERM to any of them and finds a step at which all stop; Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self):
        self.signal = None
        self._restore = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                handler = self._note if alone else self._pass_on
                self._restore[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error):
        for number, handler in self._restore.items():
            signal.signal(number, handler)
        if self._restore and jax.process_count() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # all is saved: it may kill now

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _pass_on(self, number, frame):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Returns whether training is to stop after this step, the same on all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name
