"""Assigns documents to train, validation or test by a hash of their names alone."""

import hashlib

from experiments.data.batches import SPLITS, check_split

SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}


def split_of(name: str) -> str:
    """Returns the split of the document `name`, by the name's hash; SHARES has the fractions."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    if place < SHARES["train"]:
        return "train"
    return "validation" if place < SHARES["train"] + SHARES["validation"] else "test"


def share_of(split: str) -> tuple[float, float]:
    """Returns the interval of [0, 1] that is a split's part of a text cut by position."""
    check_split(split)
    start = sum(SHARES[s] for s in SPLITS[: SPLITS.index(split)])
    return start, 1.0 if split == SPLITS[-1] else start + SHARES[split]
