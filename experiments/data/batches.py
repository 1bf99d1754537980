"""Defines the batches of every dataset, and which rows of a global batch a process reads."""

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.data.patching import Patching
from seqmodels.text import tokenizers

SPLITS = ("train", "validation", "test")

State = dict[str, Any]  # an iterator's position, ready for JSON


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Fields of one split of a dataset, as this process sees it: batches, vocabulary, tokenizer.

    `iter(dataset)` starts a fresh Grain iterator: `next` returns a batch, `get_state` and
    `set_state` save and restore the position of the last batch returned, whatever was read ahead.
    Orbax takes the iterator itself as a checkpointable. The train split never ends; the others end
    after one pass.

    A batch is a dict of arrays whose first axes are (rows of this process, T):
      inputs       int32 ids; of images float32 patches, (rows, T, E)
      labels       int32; 0 where there is none. In text the label of a document's last token is the
                   tokenizer's document_id; of images it is the class of each token's document, and
                   -1 where a denoiser is not told it
      segment_ids  int32: documents of a row count from 1, padding is 0
      loss_mask    float32: 0 where there is no label
      num_bytes    int32: bytes of text that the label stands for; 0 where there is no text
    and, of some datasets of images,
      coordinates  (rows, T, A) int32: where a point stands on each of A axes
      noise, time  float32, (rows, T, E) and (rows, T): what a denoiser's inputs are mixed with, and
                   how far along, in [0, 1] and one for each document

    vocab_size: ids lie in [0, vocab_size), from which a model takes its vocabulary; 0 for patches.
    tokenizer: of text; else None.
    chance: the accuracy of guessing, for tasks and images; None for text.
    num_classes, class_names: of datasets whose label is a document's class; else 0 and ().
    input_dim: E of patches; 0 for ids.
    grid: sizes of the axes that a document's tokens lie on; None for sequences and point sets.
    patching: how images were cut into tokens, to put them together again; None where they were not.
    """

    vocab_size: int
    tokenizer: tokenizers.Tokenizer | None
    batches: grain.IterDataset
    chance: float | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    input_dim: int = 0
    grid: tuple[int, ...] | None = None
    patching: Patching | None = None

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return iter(self.batches)


def empty(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns a batch of padding: a dict of zero arrays of shape (rows, seq_len), to be filled."""
    dtypes = dict.fromkeys(("inputs", "labels", "segment_ids", "loss_mask", "num_bytes"), np.int32)
    dtypes["loss_mask"] = np.float32
    return {name: np.zeros((rows, seq_len), dtype) for name, dtype in dtypes.items()}


def process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the rows of the global batch that one process supplies: equal, contiguous slices."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 row")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size counts the whole batch and is shared equally: {batch_size} does not divide "
            f"over {process_count} processes; take a multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} is not in [0, process_count={process_count})."
        )
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def join_states(states: list[State]) -> State:
    """Returns the data position of a whole dataset, joined from those of all shares in order.

    Lists, which have an entry per row, are concatenated; other values must be equal in all shares,
    else it raises ValueError.
    """
    joined = {}
    for key, value in states[0].items():
        values = [state[key] for state in states]
        if isinstance(value, dict):
            joined[key] = join_states(values)
        elif isinstance(value, list):
            joined[key] = sum(values, [])
        elif any(other != value for other in values):
            raise ValueError(f"the shares of a data position disagree on {key!r}: {values}")
        else:
            joined[key] = value
    return joined


def check_state(state: State, names: Sequence[str]) -> None:
    """Raises ValueError if a saved data position has other entries than `names`."""
    if sorted(state) != sorted(names):
        raise ValueError(
            f"the data position that was saved has {', '.join(sorted(state)) or 'nothing'}, and one in this dataset has "
            f"{', '.join(sorted(names))}: it is of another kind of dataset, or of an earlier version. Resume with the data "
            "it was saved with, or go on from this one's start: experiments.train --new_data"
        )


class EpochOrder:
    """Endless shuffle of 0 ... n-1 with random access, which stores no permutation.

    `[i]` lies in epoch i // n, and every epoch has an order of its own, which follows from the
    seed.

    A Feistel network permutes the 4^h >= n numbers of 2h bits, whatever its round function. A
    number outside [0, n) is sent through again until it falls inside (cycle walking: Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Grain's own shuffle is of this kind,
    but starts from 2^16 numbers, which is slow for few, and (0.2.18) does not permute for
    n = 4^k + 1.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.keys = functools.lru_cache(64)(self._keys)

    def _keys(self, epoch: int) -> list[int]:
        return np.random.SeedSequence([self.seed, epoch]).generate_state(self.ROUNDS, "u8").tolist()

    def __getitem__(self, i: int) -> int:
        epoch, place = divmod(i, self.n)
        keys, half, ones = self.keys(epoch), self.half, (1 << self.half) - 1
        while True:
            left, right = place >> half, place & ones
            for key in keys:
                # The round function: multiply, fold, multiply. A product's high bits, which are
                # taken, depend on all bits of the input.
                mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ mixed >> (64 - half)
            place = left << half | right
            if place < self.n:
                return place


class ExampleIterDataset(grain.IterDataset):
    """Dataset of the batches make_batch(number of the first example), for `count` examples.

    A saved position is that number, so that it is valid for any batch size.
    """

    def __init__(self, make_batch, count: int, batch_size: int):
        super().__init__()
        self.make_batch, self.count, self.batch_size = make_batch, count, batch_size

    def __iter__(self):
        return _ExampleIterator(self)


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, dataset: ExampleIterDataset):
        super().__init__()
        self._dataset, self._example = dataset, 0

    def __next__(self):
        if self._example >= self._dataset.count:
            raise StopIteration
        batch = self._dataset.make_batch(self._example)
        self._example += self._dataset.batch_size
        return batch

    def get_state(self) -> State:
        return {"example": self._example}

    def set_state(self, state: State) -> None:
        check_state(state, ("example",))
        self._example = state["example"]


class Prefetched(grain.IterDataset):
    """Dataset that reads up to `buffer_size` batches ahead on a thread; with 0 it reads none."""

    def __init__(self, parent: grain.IterDataset, buffer_size: int):
        super().__init__(parent)
        if buffer_size < 0:
            raise ValueError(f"prefetch must be 0 or more batches, got {buffer_size}.")
        self.parent, self.buffer_size = parent, buffer_size

    def __iter__(self):
        iterator = _PrefetchIterator(self.parent.__iter__(), self.buffer_size)
        _OPEN.add(iterator)
        return iterator


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching iterator, closed at most once.

    Its `__del__` closes it again, which fails when Python is shutting down, or if `__init__`
    failed.
    """

    _done = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._done = False

    def close(self):
        if not self._done:
            self._done = True
            super().close()


_OPEN: weakref.WeakSet[_PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _close_all():
    for iterator in list(_OPEN):
        iterator.close()


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; the choices are {', '.join(SPLITS)}.")
