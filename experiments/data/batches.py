"""What every dataset hands out, and which rows of a global batch belong to a process."""

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from seqmodels.text import tokenizers

SPLITS = ("train", "validation", "test")

State = dict[str, Any]  # of an iterator: a dict, ready for JSON


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of one dataset, as this process sees it.

    `iter(dataset)` starts a fresh Grain iterator: `next` gives a batch, `get_state` and `set_state`
    (a small dict, ready for JSON) save and restore the position exactly, and Orbax takes
    the iterator itself as a checkpointable. The state is that of the last batch handed out,
    whatever was read ahead. The train split never ends; the others end after one pass.

    A batch is a dict of arrays of one shape (rows of this process, T):
      inputs int32; labels int32 (0 where there is none); segment_ids int32 (documents of a row
      count from 1, padding is 0); loss_mask float32 (0 where there is no target); num_bytes int32
      (bytes of text that the target stands for; 0 for the synthetic tasks).
    In text the target of a document's last token is the tokenizer's document_id.
    A row's length is `(segment_ids > 0).sum(-1)`.

    vocab_size: ids lie in [0, vocab_size); a model takes its vocabulary from here.
    tokenizer: None for the synthetic tasks.
    chance: the accuracy of guessing, for the synthetic tasks; None for text.
    """

    vocab_size: int
    tokenizer: tokenizers.Tokenizer | None
    batches: grain.IterDataset
    chance: float | None = None

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return iter(self.batches)


def empty(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch of padding only, to be written into."""
    return {
        "inputs": np.zeros((rows, seq_len), np.int32),
        "labels": np.zeros((rows, seq_len), np.int32),
        "segment_ids": np.zeros((rows, seq_len), np.int32),
        "loss_mask": np.zeros((rows, seq_len), np.float32),
        "num_bytes": np.zeros((rows, seq_len), np.int32),
    }


def process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that one process supplies: equal, contiguous slices."""
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
    """The position of a whole dataset from those of its shares, in their order: lists, which have
    an entry for each row, one after the other; all else is the same in all shares."""
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
    """Raises ValueError where a position is not of the kind that has these entries."""
    if sorted(state) != sorted(names):
        raise ValueError(
            f"the data position that was saved has {', '.join(sorted(state)) or 'nothing'}, and one in this dataset has "
            f"{', '.join(sorted(names))}: it is of another kind of dataset, or of an earlier version. Resume with the data "
            "it was saved with, or go on from this one's start: experiments.train --new_data"
        )


class EpochOrder:
    """An endless shuffle of 0 ... n-1 with random access: `[i]` lies in epoch i // n, and every
    epoch has an order of its own.

    A Feistel network is a bijection of the 4^h >= n numbers of 2h bits whatever its round function;
    a place outside [0, n) is sent through again until it falls inside (cycle walking: Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). No memory, however many documents.
    Grain's own shuffle is of this kind, but takes 12 ms an element for n = 5, since it starts from
    2^16 places, and (0.2.18) is no bijection for n = 4^k + 1.
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
                # Multiply, fold, multiply; the high bits of a product depend on all of the input.
                mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ mixed >> (64 - half)
            place = left << half | right
            if place < self.n:
                return place


class Prefetched(grain.IterDataset):
    """Reads up to `buffer_size` batches ahead on one thread; 0 reads in the caller's."""

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
    """Grain's, closed once: its `__del__` closes again, and fails where Python is shutting down, or
    where it was never whole."""

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
