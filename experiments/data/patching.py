"""Cuts images and videos into the patches that are a model's tokens, and puts them together."""

import dataclasses
import math

import numpy as np

from seqmodels.modules import grids

LOW, HIGH = -1.0, 1.0  # inputs of black and of full intensity


@dataclasses.dataclass(frozen=True)
class Patching:
    """Fields that say how an image, or a video, is cut into tokens (`grids.patchify`).

    A token is a patch, and its E features are the patch's values, row by row, channels the fastest.
    Tokens go through the grid of patches with its last axis the fastest.

    sizes: pixels along each axis, (height, width) or (frames, height, width).
    patch: pixels of a patch along each axis, which divide the sizes.
    channels: 1 for grey values, 3 for RGB.
    Raises ValueError for a patch that does not divide the sizes.
    """

    sizes: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int = 1

    def __post_init__(self):
        for size, patch in zip(self.sizes, self.patch, strict=True):
            if patch < 1 or size < 1 or size % patch:
                raise ValueError(
                    f"patches of {_times(self.patch)} pixels do not divide {_times(self.sizes)} "
                    "pixels: take a patch that divides every axis, or another size"
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """Returns the number of patches along each axis."""
        return tuple(size // patch for size, patch in zip(self.sizes, self.patch))

    @property
    def tokens(self) -> int:
        """Returns T, the number of patches of an image or a video."""
        return math.prod(self.grid)

    @property
    def features(self) -> int:
        """Returns E, the number of values of a patch."""
        return math.prod(self.patch) * self.channels

    def patchify(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the tokens (..., T, E) of pixels (..., *sizes, channels)."""
        shape = (*self.sizes, self.channels)
        lead = pixels.shape[: pixels.ndim - len(shape)]
        tokens = grids.patchify(pixels.reshape(-1, *shape), self.patch)
        return tokens.reshape(*lead, self.tokens, self.features)

    def unpatchify(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the pixels (..., *sizes, channels) of tokens (..., T, E)."""
        flat = tokens.reshape(-1, self.tokens, self.features)
        pixels = grids.unpatchify(flat, self.grid, self.patch)
        return pixels.reshape(*tokens.shape[:-2], *self.sizes, self.channels)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels on the scale of inputs, [-1, 1], as uint8 from 0 to 255, cut off outside."""
    scaled = (np.asarray(pixels, np.float64) - LOW) / (HIGH - LOW)
    return np.clip(np.round(255 * scaled), 0, 255).astype(np.uint8)


def _times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))
