"""Handwritten digits as patches (`digits`) and as sequences of grey values (`digit_pixels`)."""

import dataclasses
import functools

import numpy as np

from experiments.data.patching import HIGH, LOW, Patching
from experiments.data.vision import digits_source, examples
from experiments.data.vision.examples import Example, Examples, check

RESIZES = ("bilinear", "nearest")
_NAMES = tuple(map(str, range(digits_source.NUM_CLASSES)))


@dataclasses.dataclass(frozen=True)
class Digits(examples.Options):
    """Options of scikit-learn's digits as patches, (B, T, patch^2), scaled to [-1, 1].

    size: pixels along each side; other sizes than 8 are resized, for tests of other resolutions.
    resize: "bilinear" or "nearest", which repeats pixels.
    patch: pixels of a patch along each side; T = (size / patch)^2 tokens per image.
    shift: of training images, the largest number of pixels that they are moved by, at random, along
      each axis; what comes in is black.
    noise: of training images, the standard deviation of what is added to their inputs.
    """

    size: int = 8
    resize: str = "bilinear"
    patch: int = 1
    shift: int = 0
    noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(
            self.resize in RESIZES,
            f"unknown resize={self.resize!r}; the choices are {', '.join(RESIZES)}.",
        )
        check(
            0 <= self.shift < self.size,
            f"shift must be from 0 to size - 1 = {self.size - 1} pixels, got {self.shift}.",
        )
        check(self.noise >= 0, f"noise must be 0 or more, got {self.noise}.")
        self.patching  # noqa: B018, raises where the patch does not divide the size

    @property
    def patching(self) -> Patching:
        return Patching((self.size,) * 2, (self.patch,) * 2)

    def read(self, split: str) -> Examples:
        """Returns the images of a split as `Examples`."""
        images, labels = digits_source.read(split)
        images = resized(images, self.size, self.resize)
        images = LOW + (HIGH - LOW) * images / (digits_source.LEVELS - 1)
        train, patching = split == "train", self.patching

        def make(number: int, rng: np.random.Generator) -> Example:
            image = images[number]
            if train and self.shift:
                image = moved(image, rng.integers(-self.shift, self.shift + 1, 2))
            inputs = patching.patchify(image[..., None])
            if train and self.noise:
                inputs = inputs + self.noise * rng.standard_normal(inputs.shape, np.float32)
            return self.example(inputs, labels[number], rng, train)

        return Examples(make, len(images), patching.tokens, examples.classes(_NAMES, patching))


@dataclasses.dataclass(frozen=True)
class DigitPixels:
    """Options of the digits as token ids for causal models: 64 grey values, row by row.

    The label, the digit, stands at the last pixel and nowhere else, and only it counts.

    pack: number of images per row, each a document of its own.
    """

    pack: int = 1

    def __post_init__(self):
        check(self.pack >= 1, f"pack must be at least 1 image per row, got {self.pack}.")

    def read(self, split: str) -> Examples:
        """Returns the images of a split as `Examples`."""
        images, labels = digits_source.read(split)
        ids = images.reshape(len(images), -1).astype(np.int32)
        last = np.eye(1, ids.shape[1], ids.shape[1] - 1, dtype=np.int32)[0]

        def make(number: int, rng: np.random.Generator) -> Example:
            return {
                "inputs": ids[number],
                "labels": labels[number] * last,
                "loss_mask": last.astype(np.float32),
            }

        about = examples.classes(_NAMES, vocab_size=digits_source.LEVELS)
        return Examples(make, len(ids), ids.shape[1], about)


def moved(image: np.ndarray, by) -> np.ndarray:
    """Returns an image (H, W) moved by (down, right) pixels; what comes in is black."""
    out = np.full_like(image, LOW)
    (H, W), (down, right) = image.shape, by
    out[max(down, 0) : H + min(down, 0), max(right, 0) : W + min(right, 0)] = image[
        max(-down, 0) : H + min(-down, 0), max(-right, 0) : W + min(-right, 0)
    ]
    return out


@functools.lru_cache(8)
def _resampling(old: int, new: int, kind: str) -> np.ndarray:
    """Returns the matrix (new, old) that resamples a line of `old` pixels to `new` pixels.

    "bilinear" blends the two nearest pixels by their distance and, to fewer pixels, averages with a
    triangle as wide as a new pixel (Pillow's filter). "nearest" takes the pixel below the centre.
    """
    centre_N1 = ((np.arange(new) + 0.5) * old / new)[:, None]
    if kind == "nearest":
        return (np.floor(centre_N1) == np.arange(old)[None]).astype(np.float32)
    width = max(old / new, 1.0)
    weight = np.maximum(0, 1 - np.abs(np.arange(old)[None] + 0.5 - centre_N1) / width)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def resized(images: np.ndarray, size: int, kind: str) -> np.ndarray:
    """Returns images (N, H, W) resized to (N, size, size) by "bilinear" or "nearest" resampling."""
    H, W = images.shape[1:]
    if H == W == size:
        return images
    rows, columns = _resampling(H, size, kind), _resampling(W, size, kind)
    return np.einsum("yH,NHW,xW->Nyx", rows, images, columns)
