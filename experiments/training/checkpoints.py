"""Saves and restores training state and data position, in workdir/checkpoints/<step>, by Orbax.

A checkpoint has three parts: "params", "training" (step and optimizer state) and "data" (one JSON
file for each of the equal shares of the batch's rows). Models with statistics of batches have a
fourth, "collections". All processes write and read one folder. A
checkpoint can be restored on another mesh and by another number of processes, data position
included. Saving runs in the background. A step's folder appears by a rename once all of it is
written, so a process killed at any moment leaves complete checkpoints and at most one temporary
folder, which the next training run removes.
"""

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

import flax.struct
import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from experiments.data import batches
from experiments.launch.distributed import DataShare
from experiments.training.optimizers import path_name
from seqmodels.array_typing import Array


@flax.struct.dataclass
class TrainState:
    """Fields of what training changes, and checkpoints hold.

    collections: collections of Flax beside the parameters, such as statistics of batches,
      {name: tree}; {} of models without any.
    """

    step: Array
    params: dict
    opt_state: tuple
    collections: dict = flax.struct.field(default_factory=dict)


class SaveFailed(RuntimeError):
    """Error of a checkpoint that cannot be saved; says why, and which checkpoints exist."""


class DataPosition:
    """Data iterator's position as one part of a checkpoint: a JSON file per share of the batch.

    Reading joins the files of all shares (`batches.join_states`), and the iterator takes the
    position of its own share from them. So the next batches are those that the writing run would
    have seen, whatever the number of processes: no example is repeated or skipped.
    """

    def __init__(self, iterator, share: DataShare = DataShare()):  # noqa: B008, frozen
        self.iterator, self.share = iterator, share

    async def save(self, directory):
        text = json.dumps(self.iterator.get_state())

        async def write():
            path = Path(await directory.await_creation())
            if self.share.first:
                name = f"share_{self.share.index}_of_{self.share.count}.json"
                (path / name).write_text(text)

        return write()

    async def load(self, directory):
        raise NotImplementedError("use `read`: Orbax wraps errors of what it loads into its own")

    def read(self, directory: Path) -> None:
        """Restores the iterator. Raises ValueError if a file is missing or the data changed."""
        found = sorted(directory.glob("share_*_of_*.json"))
        count = int(re.search(r"_of_(\d+)", found[0].name)[1]) if found else 1
        paths = [directory / f"share_{i}_of_{count}.json" for i in range(count)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise ValueError(f"{directory} is not whole: it lacks {', '.join(missing)}")
        self.iterator.set_state(
            batches.join_states([json.loads(path.read_text()) for path in paths])
        )


class Checkpoints:
    """Checkpoints of one run: saves, restores and lists them.

    workdir: the run's folder.
    keep: how many of the latest checkpoints stay.
    training: whether this process trains. If so, the files of an interrupted save are removed
      first.
    share: the share of the batch that this process reads.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 2,
        training: bool = True,
        share: DataShare = DataShare(),  # noqa: B008, frozen
    ):
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least the latest one has to stay")
        self.directory = Path(workdir).absolute() / "checkpoints"
        if training and jax.process_index() == 0:
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                _remove(unfinished)
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policies.LatestN(keep)
        )
        self._share = share
        self._pending = None
        self._failed = False

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or None without one."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, state: TrainState, data_iterator) -> None:
        """Starts saving `state` and the data iterator's position; returns once they are copied.

        Does nothing if the state's step is saved already. If saving fails later, the next `poll`,
        `save` or `wait` raises SaveFailed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step():
            return
        parts = _parts(state) | {"data": DataPosition(data_iterator, self._share)}
        try:
            self._pending = self._checkpointer.save_checkpointables_async(step, parts, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def poll(self) -> None:
        """Raises SaveFailed if the save in the background has failed; does not wait for its end."""
        with contextlib.suppress(TimeoutError):
            self.wait(timeout=0)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the save in the background, at most `timeout` seconds (None: without limit).

        Raises SaveFailed if it failed, and TimeoutError if it still runs then.
        """
        if self._pending is None:
            return
        try:
            self._pending.result(timeout=timeout)
        except TimeoutError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            self._pending = None
            raise self._failure(error) from error
        self._pending = None

    def restore(self, step: int, abstract_state: TrainState, data_iterator) -> TrainState:
        """Returns the state saved at `step`, in the dtypes and shardings of `abstract_state`.

        data_iterator: is set to the saved data position; None leaves that unread.
        Raises ValueError if the checkpoint is of another model, optimizer or data.
        """
        abstract = _parts(abstract_state)
        self._check_same_trees(step, abstract)
        if data_iterator is not None:
            DataPosition(data_iterator, self._share).read(self.path(step) / "data")
        parts = self._checkpointer.load_checkpointables(step, abstract)
        training, collections = parts["training"], parts.get("collections", {})
        return TrainState(params=parts["params"], collections=collections, **training)

    def restore_parts(self, step: int, abstract_state: TrainState, names: tuple[str, ...]) -> dict:
        """Returns some parts of the checkpoint of `step`, such as for evaluation: name -> tree.

        names: of "params", "training" and, where the model has any, "collections". Raises
          ValueError if shapes differ from `abstract_state`'s.
        """
        abstract = {name: _parts(abstract_state)[name] for name in names}
        self._check_same_trees(step, abstract)
        return self._checkpointer.load_checkpointables(step, abstract)

    def close(self) -> None:
        """Waits for the save in the background and closes Orbax. Raises SaveFailed if it failed."""
        self.wait()
        try:
            self._checkpointer.close()
        except (OSError, ValueError, RuntimeError):
            if not self._failed:  # Orbax raises the same failure a second time
                raise

    def _check_same_trees(self, step: int, abstract: dict) -> None:
        """Raises ValueError if checkpoint `step` has other leaves or shapes than `abstract`.

        abstract: part's name -> expected tree of shapes. The message lists up to 20 leaves that
          differ.
        """
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns that "data" has no metadata
        try:
            saved = self._checkpointer.checkpointables_metadata(step).metadata
        finally:
            logging.set_verbosity(verbosity)
        found = _shapes({name: saved.get(name, {}) for name in abstract})
        expected = _shapes(abstract)
        differing = [
            f"  {path}: checkpoint {found.get(path, 'has none')}, this config "
            f"{expected.get(path, 'has none')}"
            for path in sorted(found.keys() | expected.keys())
            if found.get(path) != expected.get(path)
        ]
        if differing:
            more = [f"  ... and {len(differing) - 20} more"] if len(differing) > 20 else []
            raise ValueError(
                f"checkpoint {self.path(step)} is of another model or optimizer than this config; "
                "nothing was changed. "
                "Use the config it was trained with, or another --workdir. What differs:\n"
                + "\n".join(differing[:20] + more)
            )

    def _failure(self, error: Exception) -> SaveFailed:
        self._failed = True
        self._checkpointer.reload()
        kept = self.steps()
        reason = "no space left on device" if is_disk_full(error) else str(error)
        return SaveFailed(
            f"could not save a checkpoint in {self.directory}: {reason}. "
            + (
                f"Intact checkpoints: steps {', '.join(map(str, kept))}."
                if kept
                else "There are none."
            )
        )


def _remove(folder: Path) -> None:
    """Removes a folder, retrying for 10 seconds, since a failed save may still be writing to it."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(folder)


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error means a full disk, by its text, as TensorStore sets no errno."""
    return "No space left on device" in str(error)


def _parts(state: TrainState) -> dict:
    parts = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return parts | ({"collections": state.collections} if state.collections else {})


def _shapes(tree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
