"""Datasets of images, videos and point sets: numbered examples, packed as documents into rows.

A dataset is a frozen dataclass whose fields are its options; `read(split)` returns its `Examples`.
"""

import dataclasses
from typing import Any, Protocol

from experiments.data.vision.digit_points import DigitPoints
from experiments.data.vision.digits import DigitPixels, Digits
from experiments.data.vision.examples import Examples, example_batches
from experiments.data.vision.images import Images
from experiments.data.vision.moving_digits import MovingDigits

__all__ = ["DATASETS", "example_batches", "make", "options"]


class VisionDataset(Protocol):
    pack: int

    def read(self, split: str) -> Examples: ...


DATASETS: dict[str, Any] = {
    "digits": Digits,
    "digit_pixels": DigitPixels,
    "moving_digits": MovingDigits,
    "digit_points": DigitPoints,
    "images": Images,
}


def options(name: str) -> dict[str, Any]:
    """Returns the options of the dataset `name`, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(DATASETS[name])}


def make(name: str, **given) -> VisionDataset:
    """Returns the dataset with these options. Raises ValueError for values that cannot be."""
    try:
        return DATASETS[name](**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
