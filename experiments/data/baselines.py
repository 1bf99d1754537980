"""What a text model's bits per byte are to be held against, on the same held-out bytes."""

import gzip
from collections.abc import Iterable

import numpy as np

START = 256  # before a document's first byte


def gzip_bits_per_byte(held_out: bytes) -> float:
    """8 x the size of `gzip -9` of the bytes, over their number.

    gzip reads them as one file with its 32 KB window and has seen no training text: it is a
    reference point that everyone knows, not a trained competitor.
    """
    if not held_out:
        raise ValueError("Empty corpus: there are no held-out bytes to compress.")
    return 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)


def bigram_bits_per_byte(
    train: Iterable[bytes], held_out: Iterable[bytes], smoothing: float = 1.0
) -> float:
    """Bits per byte of a byte-bigram model fitted on `train`, on `held_out`; both are documents.

    p(b | a) = (count(a, b) + smoothing) / (count(a) + 256 smoothing). A document's first byte is
    predicted from START, so every byte is predicted once, as a byte-level model of this repository
    does, and smoothing=1 is add-one.
    """
    counts = np.zeros((257, 256))
    for document in train:
        np.add(counts, _bigrams(document), out=counts)
    log_p = np.log2(counts + smoothing) - np.log2(counts.sum(1, keepdims=True) + 256 * smoothing)
    held = np.zeros((257, 256))
    for document in held_out:
        np.add(held, _bigrams(document), out=held)
    if not held.sum():
        raise ValueError("Empty corpus: there are no held-out bytes to score.")
    return float(-(held * log_p).sum() / held.sum())


def _bigrams(document: bytes) -> np.ndarray:
    """(257, 256): how often the second byte follows the first."""
    current = np.frombuffer(document, np.uint8).astype(np.int64)
    previous = np.append(START, current[:-1])[: len(current)]
    return np.bincount(previous * 256 + current, minlength=257 * 256).reshape(257, 256)
