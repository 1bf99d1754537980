"""Handwritten digits as sets of points: the coordinates of lit pixels, with their intensities."""

import dataclasses

import numpy as np

from experiments.data.patching import HIGH, LOW
from experiments.data.vision import digits_source, examples
from experiments.data.vision.examples import Example, Examples, check

ORDERS = ("rows", "random")


@dataclasses.dataclass(frozen=True)
class DigitPoints(examples.Options):
    """Options of the digits as point sets: a token per lit pixel, as many as a digit has.

    Inputs are (intensity, y, x), each scaled to [-1, 1]; `coordinates` (B, T, 2) are the pixel's
    row and column. Rows are padded to the longest digit's points.

    threshold: the least grey value, 1 to 16, of a lit pixel.
    order: "rows" (row by row) or "random", drawn for each example.
    """

    threshold: int = 1
    order: str = "rows"

    def __post_init__(self):
        super().__post_init__()
        check(
            self.task == "classification",
            "digit_points has no denoising: take task=classification.",
        )
        check(
            self.order in ORDERS,
            f"unknown order={self.order!r}; the choices are {', '.join(ORDERS)}.",
        )
        check(
            1 <= self.threshold <= 8,  # every digit has a pixel of 8
            f"threshold must be from 1 to 8, got {self.threshold}.",
        )

    def read(self, split: str) -> Examples:
        """Returns the point sets of a split as `Examples`."""
        images, labels = digits_source.read(split)
        most = int((digits_source.load()[0] >= self.threshold).sum((1, 2)).max())
        train = split == "train"

        def make(number: int, rng: np.random.Generator) -> Example:
            image = images[number]
            coordinates = np.argwhere(image >= self.threshold).astype(np.int32)
            if self.order == "random":
                coordinates = rng.permutation(coordinates)
            y, x = coordinates.T
            features = np.stack(
                [
                    image[y, x] / (digits_source.LEVELS - 1),
                    *(coordinates.T / (digits_source.SIZE - 1)),
                ],
                axis=-1,
            )
            inputs = (LOW + (HIGH - LOW) * features).astype(np.float32)
            return self.example(inputs, labels[number], rng, train, coordinates=coordinates)

        names = tuple(map(str, range(digits_source.NUM_CLASSES)))
        about = examples.classes(names, input_dim=3)
        return Examples(make, len(images), most, about)
