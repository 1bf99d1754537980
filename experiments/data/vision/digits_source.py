"""Reads scikit-learn's handwritten digits, which come with the package, in a fixed split.

1,797 grey images of 8x8 pixels with values 0 to 16 (E. Alpaydin and C. Kaynak, "Optical Recognition
of Handwritten Digits", UCI Machine Learning Repository, 1998; the test part of that set). Writers
are not named there, so that a random split is the usual one.

The split is stratified and never changes: the images of each digit, in an order drawn by
numpy's RandomState(0), give the first 20 % to test, the next 10 % to validation (both rounded), and
the rest to training: 359, 179 and 1,259 images.
"""

import functools

import numpy as np

from experiments.data.batches import check_split

LEVELS = 17  # grey values 0 to 16
SIZE = 8
NUM_CLASSES = 10
_SHARES = {"test": 0.2, "validation": 0.1}


@functools.cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns all images, (1797, 8, 8) float32 from 0 to 16, and their labels, (1797,) int32.

    Raises ValueError, naming the extra, without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: pip install '.[vision]'"
        ) from error
    found = datasets.load_digits()
    return found.images.astype(np.float32), found.target.astype(np.int32)


@functools.cache
def split_numbers(split: str) -> np.ndarray:
    """Returns the numbers, ascending, of a split's images among all 1,797."""
    check_split(split)
    labels = load()[1]
    random = np.random.RandomState(0)
    numbers = []
    for digit in range(NUM_CLASSES):
        drawn = random.permutation(np.flatnonzero(labels == digit))
        parts = {}
        for name, share in _SHARES.items():
            count = round(share * np.count_nonzero(labels == digit))
            parts[name], drawn = drawn[:count], drawn[count:]
        numbers.append((parts | {"train": drawn})[split])
    return np.sort(np.concatenate(numbers))


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a split's images, (N, 8, 8) float32 from 0 to 16, and labels, (N,) int32."""
    images, labels = load()
    numbers = split_numbers(split)
    return images[numbers], labels[numbers]
