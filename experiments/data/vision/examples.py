"""Examples of images, videos and point sets: what a dataset makes, and rows of a batch from it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from experiments.data import batches
from experiments.data.patching import Patching

TASKS = ("classification", "denoising")
NO_CLASS = -1  # label of a document whose class is hidden from a denoiser

# Name in a batch -> array whose first axis is the example's tokens.
Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Fields of one split of a dataset whose examples have numbers.

    make: (number, rng) -> the Example of that number; rng is for all that is drawn.
    count: number of examples; 0 for a training split that never repeats one.
    tokens: T of the longest example.
    about: fields of `batches.Dataset` that describe the examples, such as num_classes and grid.
    """

    make: Callable[[int, np.random.Generator], Example]
    count: int
    tokens: int
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that all datasets of this package share.

    task: "classification" (the label counts once per document, at its first token) or "denoising"
      (every token counts; `noise` and `time` are drawn for each example).
    label_dropout: of denoising, the share of training examples whose class is hidden (label -1),
      so that samples can be guided.
    pack: number of examples per row, each a document of its own.
    """

    task: str = "classification"
    label_dropout: float = 0.1
    pack: int = 1

    def __post_init__(self):
        check(
            self.task in TASKS, f"unknown task={self.task!r}; the choices are {', '.join(TASKS)}."
        )
        check(
            0 <= self.label_dropout <= 1,
            f"label_dropout must lie in [0, 1], got {self.label_dropout}.",
        )
        check(self.pack >= 1, f"pack must be at least 1 example per row, got {self.pack}.")

    def example(
        self, inputs: np.ndarray, label: int, rng: np.random.Generator, train: bool, **more
    ) -> Example:
        """Returns the Example of a document's inputs (N, E) and class, for this task.

        Noise is standard normal, and `time` uniform in [0, 1], one per document.
        """
        N = len(inputs)
        found = {"inputs": inputs, "labels": np.full(N, label), "loss_mask": np.zeros(N)} | more
        if self.task == "classification":
            found["loss_mask"][0] = 1.0
            return found
        found["noise"] = rng.standard_normal(inputs.shape, np.float32)
        found["time"] = np.full(N, rng.random())
        found["loss_mask"][:] = 1.0
        if rng.random() < self.label_dropout and train:
            found["labels"][:] = NO_CLASS
        return found


def check(ok: bool, message: str) -> None:
    """Raises ValueError with the message unless `ok`."""
    if not ok:
        raise ValueError(message)


def classes(names, patching: Patching | None = None, **more) -> dict[str, Any]:
    """Returns `Examples.about` for classes of these names and, with a patching, for its tokens."""
    about = {"num_classes": len(names), "class_names": tuple(names), "chance": 1 / len(names)}
    if patching is not None:
        about |= {
            "grid": patching.grid,
            "input_dim": patching.features,
            "patching": patching,
        }
    return about | more


def example_batches(
    examples: Examples, split: str, *, pack: int, seed: int, batch_size: int, rows: range
) -> grain.IterDataset:
    """Returns the dataset of batches of packed examples: of each global batch the given `rows`.

    Training reads the examples in a new order each epoch, and draws (noise, augmentation) anew for
    each. The other splits are one pass, in an order and with draws that are the same for every
    seed; its last batch is filled up with padding. A saved position is the number of the next
    example, valid for any batch size and `pack`.
    """
    train = split == "train"
    place = batches.SPLITS.index(split)
    key = np.random.SeedSequence([seed * train, place]).generate_state(1, np.uint64)
    order = batches.EpochOrder(examples.count, seed * train) if examples.count else None
    count = 2**62 if train else examples.count
    T = pack * examples.tokens

    def example(position: int) -> Example:
        # Philox is counter-based: a generator per position in the stream of examples.
        philox = np.random.Philox(key=np.append(key, np.uint64(position)))
        number = position if order is None else order[position]
        return examples.make(number, np.random.Generator(philox))

    shapes = {name: (x.shape[1:], x.dtype) for name, x in example(0).items()}

    def make_batch(first: int):
        batch = batches.empty(len(rows), T)
        for name, (shape, dtype) in shapes.items():
            default = np.int32 if np.issubdtype(dtype, np.integer) else np.float32
            batch[name] = np.zeros((len(rows), T, *shape), default)
        for row, r in enumerate(rows):
            start = 0
            for segment in range(pack):
                position = first + r * pack + segment
                if position >= count:
                    break
                found = example(position)
                stop = start + len(found["labels"])
                for name, value in found.items():
                    batch[name][row, start:stop] = value
                batch["segment_ids"][row, start:stop] = segment + 1
                start = stop
        return batch

    return batches.ExampleIterDataset(make_batch, count, batch_size * pack)
