"""Helpers that tests of the data pipeline share."""

import itertools

import numpy as np

from experiments.data import documents


def split_bytes(config, split):
    """Returns all bytes of a text dataset's split, its documents one after the other."""
    source = documents(config, split)
    return b"".join(source[i] for i in range(len(source)))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def concatenated(*parts):
    """Returns the global batches of processes that each supplied a part of the rows."""
    return [
        {k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts, strict=True)
    ]


def segments(batch):
    """Returns (inputs, labels, mask) of every segment, row by row."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            (at,) = np.nonzero(ids == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)), "a segment is one run"
            yield tuple(batch[k][row, at] for k in ("inputs", "labels", "loss_mask"))
