"""What a text model's bits per byte are to be held against, on the same held-out bytes.

A model here says where each document ends, too, and pays for it (`packing`). So do these: both are
told of the ends of all documents (a `text.Piece` has none), and both divide by the bytes of the
text alone. Empty documents are passed over, as packing does.
"""

import gzip
from collections.abc import Iterable

import numpy as np

from experiments.data.text import Piece

END = 256  # after a document's last byte, and before its first


def gzip_bits_per_byte(held_out: Iterable[bytes]) -> float:
    """8 x the size of `gzip -9` of the documents, over their number of bytes.

    gzip reads them as one file, in which a byte 0 stands for each document's end, with its 32 KB
    window, and has seen no training text: it is a reference point that everyone knows, not a
    trained competitor.
    """
    documents = [document for document in held_out if document]
    if not documents:
        raise ValueError("Empty corpus: there are no held-out bytes to compress.")
    told = b"".join(document + b"\0" * _ends(document) for document in documents)
    return 8 * len(gzip.compress(told, 9, mtime=0)) / sum(map(len, documents))


def bigram_bits_per_byte(
    train: Iterable[bytes], held_out: Iterable[bytes], smoothing: float = 1.0
) -> float:
    """Bits per byte of a byte-bigram model fitted on `train`, on `held_out`; both are documents.

    p(b | a) = (count(a, b) + smoothing) / (count(a) + 257 smoothing), a and b among the 256 bytes
    and END. A document's first byte is predicted from END, and END from its last byte, so every
    byte and every end is predicted once, as a byte-level model of this repository does, and
    smoothing=1 is add-one.
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
    """(257, 257): how often the second symbol follows the first."""
    end = np.repeat(END, _ends(document))
    symbols = np.concatenate([[END], np.frombuffer(document, np.uint8), end])
    return np.bincount(symbols[:-1] * 257 + symbols[1:], minlength=257 * 257).reshape(257, 257)
