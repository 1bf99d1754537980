"""Reads images with a class each: a folder of image files, or an image dataset of TFDS."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.data import splits
from experiments.data.batches import SPLITS

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Fields of a split of images.

    read: an image's number -> (its pixels, its class), the pixels as `resize` returns them.
    count: number of images. classes: names of all classes of the dataset.
    """

    read: Callable[[int], tuple[np.ndarray, int]]
    count: int
    classes: tuple[str, ...]


def pillow():
    """Returns the module PIL.Image. Raises ValueError, naming the extra, without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "images are read by Pillow, which is not installed: pip install '.[vision]'"
        ) from error
    return Image


def of_folder(folder: str, split: str, resize: Callable) -> LabelledImages:
    """Returns a split of the images <folder>/<class>/<name>.png, or <folder>/<split>/<class>/...

    Without folders of the splits, an image's split follows from a hash of <class>/<name>
    (`splits.split_of`): 90 % train, 5 % validation, 5 % test. Other formats that Pillow reads have
    their own endings (SUFFIXES).

    resize: function from a PIL image to an array.
    Raises ValueError where there is no such folder, or it has no classes or no images.
    """
    Image = pillow()
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"config.data.folder is {folder!r}, which is no folder")
    divided = any((root / name).is_dir() for name in SPLITS)
    if divided and not (root / split).is_dir():
        raise ValueError(f"{root} has folders of splits, and none is called {split!r}")
    base = root / split if divided else root
    # Classes are those of the whole dataset, also where a split has no image of one.
    parts = [root / name for name in SPLITS if (root / name).is_dir()] if divided else [root]
    classes = sorted({path.name for part in parts for path in part.iterdir() if path.is_dir()})
    if len(classes) < 2:
        raise ValueError(
            f"{root} has {len(classes)} folders of classes; images stand in "
            "<folder>/<class>/<name>.png, and there are at least two classes"
        )
    found = []
    for label, name in enumerate(classes):
        for path in sorted((base / name).glob("*")):
            chosen = divided or splits.split_of(f"{name}/{path.name}") == split
            if path.suffix.lower() in SUFFIXES and chosen:
                found.append((path, label))
    if not found:
        raise ValueError(
            f"{base} has no images for the {split} split; they end in {', '.join(SUFFIXES)}"
            + ("" if divided else ". With few images, make folders train, validation and test")
        )

    def read(number: int) -> tuple[np.ndarray, int]:
        path, label = found[number]
        with Image.open(path) as image:
            return resize(image), label

    return LabelledImages(read, len(found), tuple(classes))


def of_tfds(
    name: str, split: str, data_dir: str, image_key: str, label_key: str, resize: Callable
) -> LabelledImages:
    """Returns a split of an image dataset of TFDS; errors as in `tfds_source`.

    split: in TFDS's notation. image_key, label_key: its features of the images and their classes.
    """
    import tensorflow_datasets as tfds  # takes seconds

    from experiments.data import tfds_source

    Image = pillow()
    builder = tfds_source.open_builder(name, data_dir)
    for key, kind, option in (
        (image_key, tfds.features.Image, "image_key"),
        (label_key, tfds.features.ClassLabel, "label_key"),
    ):
        tfds_source.check_feature(builder, name, key, kind, option)
    # Images stay encoded until Pillow reads them: decoders of TFDS take OpenCV or TensorFlow.
    raw = {image_key: tfds.decode.SkipDecoding()}
    encoded = tfds_source.read_split(builder, name, split, decoders=raw)

    def read(number: int) -> tuple[np.ndarray, int]:
        found = encoded[number]
        with Image.open(io.BytesIO(found[image_key])) as image:
            return resize(image), int(found[label_key])

    return LabelledImages(read, len(encoded), tuple(builder.info.features[label_key].names))
