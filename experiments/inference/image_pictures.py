"""Draws what models of images do: confusion tables, loss by time, sheets of samples, videos."""

from pathlib import Path

import numpy as np

from experiments.data.vision import image_files
from experiments.training import plots
from experiments.training.plots import plt

_WIDTH = 640  # pixels of a sheet, about: small images are enlarged
_MARGIN = 2  # pixels between images
_LINE = 14  # pixels of a line of text


def confusion(table_WW: np.ndarray, names: tuple[str, ...], title: str, path: Path) -> None:
    """Draws how often each class (row) was taken for each class (column), into a PNG.

    table_WW: counts. Shades are shares of a row; up to 20 classes have their counts written in.
    """
    W = len(names)
    share_WW = table_WW / np.maximum(table_WW.sum(1, keepdims=True), 1)
    side = min(max(0.45 * W, 4.0), 14.0)
    figure, axes = plt.subplots(figsize=(side + 1.2, side + 0.8), layout="constrained")
    image = axes.imshow(share_WW, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticks(range(W), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(W), names)
    if W <= 20:
        for row, column in np.argwhere(table_WW):
            colour = "white" if share_WW[row, column] > 0.5 else "black"
            text = str(int(table_WW[row, column]))
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    plots.save(figure, path)


def loss_by_time(table: list[dict], title: str, path: Path) -> None:
    """Draws a denoiser's loss over the diffusion time, into a PNG.

    table: a dict with first, last and loss for each range of times.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    middle = [(row["first"] + row["last"]) / 2 for row in table]
    axes.plot(middle, [row["loss"] for row in table], "o-")
    axes.set(xlabel="time: 0 is the image, 1 is noise", ylabel="mean squared error per value")
    axes.set(title=title, xlim=(0, 1), ylim=(0, None))
    axes.grid(alpha=0.3)
    plots.save(figure, path)


def sheet(images: np.ndarray, names: tuple[str, ...], title: str):
    """Returns a PIL image with a row of images for each name, under a title.

    images: uint8 (rows, columns, height, width, 1 or 3 channels).
    """
    Image = image_files.pillow()
    from PIL import ImageDraw

    rows, columns, H, W, C = images.shape
    factor = max(1, _WIDTH // (columns * W))
    images = np.broadcast_to(images, (rows, columns, H, W, 3))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    H, W = H * factor + _MARGIN, W * factor + _MARGIN
    left = 8 + 7 * max(map(len, names))
    size = (max(left + columns * W, 8 + 7 * len(title)), _LINE + 6 + rows * H)
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), title, fill=(0, 0, 0))
    for row, name in enumerate(names):
        top = _LINE + 6 + row * H
        draw.text((4, top + (H - _LINE) // 2), name, fill=(0, 0, 0))
        for column in range(columns):
            canvas.paste(Image.fromarray(images[row, column]), (left + column * W, top))
    return canvas


def write_samples(pixels: np.ndarray, names: tuple[str, ...], title: str, path: Path) -> Path:
    """Writes samples of each class as a sheet; returns the path, which ends in .png or .gif.

    pixels: uint8 (rows, columns, height, width, channels) or, of videos, which become a GIF,
      (rows, columns, frames, height, width, channels).
    path: without an ending.
    """
    if pixels.ndim == 5:
        path = path.with_suffix(".png")
        sheet(pixels, names, title).save(path)
        return path
    path = path.with_suffix(".gif")
    first, *others = (sheet(frame, names, title) for frame in np.moveaxis(pixels, 2, 0))
    first.save(path, save_all=True, append_images=others, duration=150, loop=0)
    return path
