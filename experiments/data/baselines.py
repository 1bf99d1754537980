"""Computes baselines (gzip, a byte bigram) for a text model's bits per byte, on the same bytes.

Like this repository's models (`packing`), baselines also predict where documents end (a
`text.Piece` has no end), and divide by the bytes of the text alone. Empty documents are skipped.
"""

import gzip
from collections.abc import Iterable

import numpy as np

from experiments.data.text import Piece

END = 256  # after a document's last byte, and before its first


def gzip_bits_per_byte(held_out: Iterable[bytes]) -> float:
    """Returns the bits per byte of `gzip -9` on the documents: 8 compressed size / size.

    gzip reads them as one file in which a byte 0 marks each document's end. It has a window of 32
    KB and sees no training text: a known reference point, not a trained competitor.
    """
    documents = [document for document in held_out if document]
    if not documents:
        raise ValueError("Empty corpus: there are no held-out bytes to compress.")
    with_ends = b"".join(document + b"\0" * _ends(document) for document in documents)
    return 8 * len(gzip.compress(with_ends, 9, mtime=0)) / sum(map(len, documents))


def bigram_bits_per_byte(
    train: Iterable[bytes], held_out: Iterable[bytes], smoothing: float = 1.0
) -> float:
    """Returns the bits per byte on `held_out` of a byte-bigram model fitted on `train`.

    p(b | a) = (count(a, b) + smoothing) / (count(a) + 257 smoothing), for a and b among the 256
    bytes and END; smoothing=1 is add-one. A document's first byte is predicted from END, and END
    from its last byte: every byte and every end once, as byte-level models here do.
    """
    counts, held = (
        sum(map(_bigrams, documents), np.zeros((257, 257))) for documents in (train, held_out)
    )
    if not held.sum():
        raise ValueError("Empty corpus: there are no held-out bytes to score.")
    log_p = np.log2(counts + smoothing) - np.log2(counts.sum(1, keepdims=True) + 257 * smoothing)
    return float(-(held * log_p).sum() / held[:, :END].sum())


def _ends(document: bytes) -> bool:
    return len(document) > 0 and not isinstance(document, Piece)


def _bigrams(document: bytes) -> np.ndarray:
    """Returns a (257, 257) table: how often symbol b follows symbol a in a document, at [a, b]."""
    end = np.repeat(END, _ends(document))
    symbols = np.concatenate([[END], np.frombuffer(document, np.uint8), end])
    return np.bincount(symbols[:-1] * 257 + symbols[1:], minlength=257 * 257).reshape(257, 257)
