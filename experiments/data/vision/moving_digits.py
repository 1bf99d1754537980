"""Moving digits: videos generated from the handwritten digits, in the manner of Moving MNIST.

Moving MNIST: "Unsupervised Learning of Video Representations using LSTMs", arXiv 1502.04681. One or
two digits of the split start at random places, move by `speed` pixels per frame in one of eight
directions, and bounce off the edges; where they overlap, the brighter pixel is seen.
"""

import dataclasses

import numpy as np

from experiments.data.patching import HIGH, LOW, Patching
from experiments.data.vision import digits_source, examples
from experiments.data.vision.examples import Example, Examples, check

LABELS = ("digit", "direction")
DIRECTIONS = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up left": (-1, -1),
    "up right": (-1, 1),
    "down left": (1, -1),
    "down right": (1, 1),
}


@dataclasses.dataclass(frozen=True)
class MovingDigits(examples.Options):
    """Options of videos of moving digits as patches, scaled to [-1, 1].

    frames, size: number of frames, and pixels along each side of one.
    digits: 1 or 2 digits per video.
    speed: pixels per frame along each axis that a digit moves on.
    label: "digit" (for two digits their unordered pair, 55 classes) or "direction" (that of the
      first frames; two digits move in the same one).
    patch_frames, patch: frames and pixels along each side of a patch; T = frames / patch_frames *
      (size / patch)^2 tokens.
    num_examples: training videos, repeated in a new order each epoch; 0 never repeats one.
    eval_examples: validation and test videos.
    """

    frames: int = 8
    size: int = 16
    digits: int = 1
    speed: int = 1
    label: str = "digit"
    patch_frames: int = 1
    patch: int = 4
    num_examples: int = 0
    eval_examples: int = 512

    def __post_init__(self):
        super().__post_init__()
        check(self.digits in (1, 2), f"digits must be 1 or 2 per video, got {self.digits}.")
        check(
            self.label in LABELS,
            f"unknown label={self.label!r}; the choices are {', '.join(LABELS)}.",
        )
        room = self.size - digits_source.SIZE
        check(
            1 <= self.speed <= room,
            f"speed={self.speed} and size={self.size}: a digit of {digits_source.SIZE} pixels moves "
            f"by 1 to size - {digits_source.SIZE} = {room} pixels per frame.",
        )
        check(
            self.num_examples >= 0 and self.eval_examples >= 1,
            f"num_examples must be 0 or more and eval_examples at least 1, got {self.num_examples} "
            f"and {self.eval_examples}.",
        )
        self.patching  # noqa: B018, raises where the patch does not divide the sizes

    @property
    def patching(self) -> Patching:
        sizes = (self.frames, self.size, self.size)
        return Patching(sizes, (self.patch_frames, self.patch, self.patch))

    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes, in the order of their labels."""
        if self.label == "direction":
            return tuple(DIRECTIONS)
        names = range(digits_source.NUM_CLASSES)
        if self.digits == 1:
            return tuple(map(str, names))
        return tuple(f"{a}{b}" for a in names for b in names if a <= b)

    def read(self, split: str) -> Examples:
        """Returns the videos of a split as `Examples`."""
        images, labels = digits_source.read(split)
        train, patching, names = split == "train", self.patching, self.class_names()

        def make(number: int, rng: np.random.Generator) -> Example:
            # A video that comes back is drawn by its number; noise and time, anew each time.
            drawn = rng
            if train and self.num_examples:
                drawn = np.random.Generator(np.random.Philox(number))
            which = drawn.integers(0, len(images), self.digits)
            direction = drawn.integers(0, len(DIRECTIONS))
            video = self.video(images[which], list(DIRECTIONS.values())[direction], drawn)
            if self.label == "direction":
                label = int(direction)
            else:
                label = names.index("".join(map(str, sorted(labels[which]))))
            return self.example(patching.patchify(video[..., None]), label, rng, train)

        count = self.num_examples if train else self.eval_examples
        return Examples(make, count, patching.tokens, examples.classes(names, patching))

    def video(self, images: np.ndarray, direction, rng: np.random.Generator) -> np.ndarray:
        """Returns the frames (frames, size, size) of digits (digits, 8, 8) that move and bounce."""
        room = self.size - digits_source.SIZE
        video = np.zeros((self.frames, self.size, self.size), np.float32)
        for image in images:
            start = rng.integers(0, room + 1, 2)
            for t, frame in enumerate(video):
                # A place that goes on without edges is folded back into [0, room].
                place = (start + t * self.speed * np.asarray(direction)) % (2 * room)
                y, x = np.where(place > room, 2 * room - place, place)
                part = frame[y : y + digits_source.SIZE, x : x + digits_source.SIZE]
                np.maximum(part, image, out=part)
        return LOW + (HIGH - LOW) * video / (digits_source.LEVELS - 1)
