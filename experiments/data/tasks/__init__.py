"""Makes examples of synthetic tasks, without files: each follows from (seed, split, number).

A task is a frozen dataclass whose fields are its options; a field `eval_x` other than 0 replaces
`x` in the validation and test splits. It has
  vocab_size, chance   as a Dataset has them
  row_length           T: the length that its examples are padded to
  example(rng)         (inputs, labels, loss_mask), one array each of the example's own length
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import grain
import numpy as np

from experiments.data import batches
from experiments.data.tasks.modular_arithmetic import ModularArithmetic
from experiments.data.tasks.mqar import MQAR
from experiments.data.tasks.parity import Parity
from experiments.data.tasks.selective_copying import SelectiveCopying
from experiments.data.tasks.word_problem import WordProblem


class SyntheticTask(Protocol):
    vocab_size: int
    chance: float
    row_length: int

    def example(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


TASKS: dict[str, Callable[..., SyntheticTask]] = {
    "mqar": MQAR,
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "word_problem": WordProblem,
    "selective_copying": SelectiveCopying,
}


def options(name: str) -> dict[str, Any]:
    """Returns the options of the task `name`, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(TASKS[name])}


def make_task(name: str, split: str, **given) -> SyntheticTask:
    """Returns the task for a split: outside of training, options eval_x replace the options x."""
    batches.check_split(split)
    values = options(name) | given
    if split != "train":
        values |= {
            key.removeprefix("eval_"): value
            for key, value in values.items()
            if key.startswith("eval_") and value
        }
    try:
        return TASKS[name](**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def task_batches(
    task: SyntheticTask, split: str, *, seed: int, num_examples: int, batch_size: int, rows: range
) -> grain.IterDataset:
    """Returns the dataset of batches of a task's examples: of each global batch the given `rows`.

    num_examples: training repeats this many, in a new order each epoch; 0 never repeats one. The
      other splits are one pass over them, whose last batch is filled up with padding.
    """
    # Philox is counter-based: a key per (seed, split), and a generator per number of an example.
    key = np.random.SeedSequence([seed, batches.SPLITS.index(split)]).generate_state(1, np.uint64)
    train = split == "train"
    if num_examples < 0 or not (train or num_examples):
        raise ValueError(f"The {split} split needs a positive number of examples: {num_examples}.")
    order = batches.EpochOrder(num_examples, seed) if train and num_examples else None
    count = 2**62 if train else num_examples

    def make_batch(first: int):
        batch = batches.empty(len(rows), task.row_length)
        for row, r in enumerate(rows):
            position = first + r
            if position < count:
                example = position if order is None else order[position]
                philox = np.random.Philox(key=np.append(key, np.uint64(example)))
                inputs, labels, mask = task.example(np.random.Generator(philox))
                batch["inputs"][row, : len(inputs)] = inputs
                batch["labels"][row, : len(inputs)] = np.where(mask, labels, 0)
                batch["segment_ids"][row, : len(inputs)] = 1
                batch["loss_mask"][row, : len(inputs)] = mask
        return batch

    return batches.ExampleIterDataset(make_batch, count, batch_size)
