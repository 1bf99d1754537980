"""Any images with classes, of a folder or of TFDS, resized and cut into patches."""

import dataclasses

import numpy as np

from experiments.data.patching import HIGH, LOW, Patching
from experiments.data.vision import examples, image_files
from experiments.data.vision.examples import Example, Examples, check


@dataclasses.dataclass(frozen=True)
class Images(examples.Options):
    """Options of images of a folder or of a TFDS dataset, as patches scaled to [-1, 1].

    folder: <folder>/<class>/<name>.png, or <folder>/<split>/<class>/<name>.png; see
      `image_files.of_folder` for how images are shared out among splits.
    tfds_name: in place of it, a TFDS dataset such as "mnist" or "cifar10", stored as array_record.
    data_dir: TFDS's folder; "" is its own default.
    image_key, label_key: features of TFDS's examples.
    train_split, validation_split, test_split: in TFDS's notation.
    size: pixels along each side that images are resized to (Pillow's bilinear filter).
    grey: whether images are grey; else they have three channels.
    patch: pixels of a patch along each side; T = (size / patch)^2 tokens per image.
    flip: whether half of the training images are mirrored, left to right.
    """

    folder: str = ""
    tfds_name: str = ""
    data_dir: str = ""
    image_key: str = "image"
    label_key: str = "label"
    train_split: str = "train[:90%]"
    validation_split: str = "train[90%:]"
    test_split: str = "test"
    size: int = 32
    grey: bool = False
    patch: int = 4
    flip: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.patching  # noqa: B018, raises where the patch does not divide the size

    @property
    def patching(self) -> Patching:
        return Patching((self.size,) * 2, (self.patch,) * 2, 1 if self.grey else 3)

    def read(self, split: str) -> Examples:
        """Returns the images of a split as `Examples`; the files are read as they are needed."""
        check(
            bool(self.folder) != bool(self.tfds_name),
            "give one of config.data.folder, of image files, and config.data.tfds_name.",
        )
        if self.folder:
            images = image_files.of_folder(self.folder, split, self._resized)
        else:
            images = image_files.of_tfds(
                self.tfds_name,
                getattr(self, f"{split}_split"),
                self.data_dir,
                self.image_key,
                self.label_key,
                self._resized,
            )
        train, patching = split == "train", self.patching

        def make(number: int, rng: np.random.Generator) -> Example:
            pixels, label = images.read(number)
            if train and self.flip and rng.random() < 0.5:
                pixels = pixels[:, ::-1]
            inputs = LOW + (HIGH - LOW) * pixels.astype(np.float32) / 255
            return self.example(patching.patchify(inputs), label, rng, train)

        about = examples.classes(images.classes, patching)
        return Examples(make, images.count, patching.tokens, about)

    def _resized(self, image) -> np.ndarray:
        """Returns a PIL image as an array (size, size, channels) of uint8."""
        box = (self.size, self.size)
        image = image.convert("L" if self.grey else "RGB").resize(
            box, image_files.pillow().BILINEAR
        )
        return np.asarray(image).reshape(*box, -1)
