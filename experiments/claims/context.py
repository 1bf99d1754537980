"""How a claim trains: by the one trainer, into a folder per config, so that runs are shared."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import common
from experiments.data import make_dataset
from experiments.training import evaluation, loop, metrics, restore, run_record, steps

Changes = Mapping[str, Any]  # {"optimizer.learning_rate": 1e-3}


class Context:
    """What a claim's `run` is given.

    smoke: whether this is a run of seconds whose verdict nobody reads. `train` shrinks its configs;
      a claim shrinks what it measures beside.
    seeds: 0, 1, ..., as many as the claim asks for; one in a smoke run.
    """

    def __init__(self, workdir: str | Path, seeds: int = 1, smoke: bool = False):
        self.smoke = smoke
        self.seeds = (0,) if smoke else tuple(range(seeds))
        self._workdir = Path(workdir) / "smoke" if smoke else Path(workdir)
        self._folders: set[Path] = set()
        self._in_work = 0.0

    def train(
        self,
        config: ConfigDict,
        changes: Changes | None = None,
        *,
        seed: int = 0,
        make_task: Callable[..., steps.Task] | None = None,
        name: str = "",
    ) -> "Run":
        """Trains what a config describes, on one device; a run of this config is read again.

        A run that was interrupted goes on from its last checkpoint. Its folder follows from the
        config alone, so that claims share baselines; after a change of the code give the binary
        another --workdir.

        changes: fields of the config that differ: {"model.pattern": "attention"}.
        seed: of the parameters and of the data.
        make_task: as in `loop.train`, of a loss of one's own; `name` then has to say which.

        Raises ValueError for a field that the config lacks.
        """
        if make_task is not None and not name:
            raise ValueError("a task of one's own needs a name: runs are told apart by it")
        config = changed(config, {"seed": seed, "data.seed": seed} | dict(changes or {}))
        config.sample.length = 0
        config.mesh.data = 1
        if self.smoke:
            common.smoke(config)
        config = config.copy_and_resolve_references()
        with self.work(config.data.name, config.to_dict(), name) as folder:
            if not (folder / "result.json").exists():
                loop.train(config, folder, jax.devices()[:1], make_task)
        return Run(folder, make_task)

    @contextlib.contextmanager
    def work(self, label: str, *key) -> Iterator[Path]:
        """Gives a folder for work that is to be found again, and adds the work's time to it.

        For what does not train by `train`, such as a linearization: what is found finished in the
        folder need not be done again.

        label: how the folder's name begins. key: what the work depends on; JSON can hold it.
        """
        text = json.dumps(key, sort_keys=True)
        folder = self._workdir / f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        self._folders.add(folder)
        before, start = _seconds(folder), processor_seconds()
        try:
            yield folder
        finally:
            taken = processor_seconds() - start
            self._in_work += taken
            run_record.write_json(folder / "seconds.json", before + taken)

    def seconds(self, taken: float) -> float:
        """Returns a claim's processor time from scratch: `taken` now, and for work it has read."""
        return taken - self._in_work + sum(map(_seconds, self._folders))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of `Context.train`: its scores, its parameters, and more scores of them."""

    workdir: Path
    make_task: Callable[..., steps.Task] | None = None

    @property
    def result(self) -> dict[str, Any]:
        """Returns the scores of the test split: loss, perplexity, accuracy, parameters, ..."""
        return json.loads((self.workdir / "result.json").read_text())

    @functools.cached_property
    def config(self) -> ConfigDict:
        return run_record.load_config(self.workdir)

    def metrics(self, name: str = "loss") -> list[tuple[int, float]]:
        """Returns a logged metric, such as "loss" or "validation_loss", as (step, value) pairs."""
        rows = metrics.read_metrics(self.workdir)
        return [(row["step"], row[name]) for row in rows if name in row]

    @functools.cached_property
    def model(self):
        return self._program(self.config).model

    @functools.cached_property
    def params(self):
        """Returns the parameters of `model`, for `model.apply({"params": params}, ...)`."""
        program = self._program(self.config)
        return program.model_params(self._trained(program))

    def batches(self, count: int, split: str = "test", changes: Changes | None = None) -> list:
        """Returns the first `count` batches of a split, as dicts of NumPy arrays."""
        data = changed(self.config, changes or {}).data
        return list(itertools.islice(make_dataset(data, split), count))

    def scores(
        self, changes: Changes | None = None, split: str = "test", max_batches: int | None = None
    ) -> evaluation.Scores:
        """Returns the scores of a split: `.totals()`, `.by_length()`, `.by_position()`.

        changes: fields of the config that differ, of other data or of a model that has the same
          parameters: {"data.eval_max_length": 512}.
        max_batches: how many batches are scored, 0: all; None: the config's train.test_batches.
        """
        config = changed(self.config, changes or {})
        if max_batches is None:
            max_batches = config.train.test_batches
        program = self._program(config)
        dataset = make_dataset(config.data, split)
        return evaluation.evaluate(program, self._trained(program), dataset, max_batches)

    def _program(self, config) -> steps.Program:
        dataset = make_dataset(config.data, "test")
        seq_len = next(iter(dataset))["inputs"].shape[1]
        config = loop.resolve(config, dataset)
        task = None if self.make_task is None else self.make_task(config, seq_len)
        return steps.build(config, seq_len, jax.devices()[:1], task)

    def _trained(self, program):
        return restore.evaluation_params(program, self.config, self.workdir)[1]


def changed(config: ConfigDict, changes: Changes) -> ConfigDict:
    """Returns a copy of a config with other values: {"optimizer.learning_rate": 1e-3}.

    Raises ValueError for a field that the config lacks.
    """
    config = config.copy_and_resolve_references()
    for path, value in changes.items():
        *sections, field = path.split(".")
        node = config
        for name in sections:
            node = node.get(name, ConfigDict())
        if field not in node:
            raise ValueError(f"no field {path!r} in the config; {', '.join(node) or 'there'} are")
        with node.ignore_type(), node.unlocked():
            node[field] = value
    return config


def processor_seconds() -> float:
    """Returns the processor time of this process and those it has started and waited for.

    Unlike the time on the wall it does not depend on what else the machine does.
    """
    return sum(os.times()[:4])


def _seconds(folder: Path) -> float:
    path = folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else 0.0
