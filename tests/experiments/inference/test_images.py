"""Scores and pictures of models of images, on numbers made by hand."""

import numpy as np
import pytest

from experiments.data.vision import image_files
from experiments.inference import image_pictures, image_scores


@pytest.fixture
def table_WW():
    return np.array([[3, 1, 0], [0, 0, 0], [2, 0, 4]])


def test_scores_by_class(table_WW):
    found = image_scores.class_scores(table_WW, ("cat", "dog", "owl"))
    assert found["accuracy"] == pytest.approx(0.7) and found["documents"] == 10
    cat, dog, owl = found["by_class"]
    assert cat["recall"] == pytest.approx(3 / 4) and cat["precision"] == pytest.approx(3 / 5)
    assert (cat["taken_for"], owl["taken_for"], dog["taken_for"]) == ("dog", "cat", None)
    assert dog["recall"] is None and dog["precision"] == 0 and dog["documents"] == 0
    text = image_scores.class_text(found | {"split": "test", "loss": 0.5})
    assert "accuracy 0.7000, loss 0.5000, 10 documents" in text
    assert text.splitlines()[-1].split() == ["owl", "6", "0.6667", "1.0000", "cat"]


def test_loss_by_time():
    found = {"time": np.array([0.0, 0.24, 0.26, 1.0]), "loss": np.array([1.0, 3.0, 5.0, 7.0])}
    rows = image_scores.by_time(found, 4)
    assert [(r["first"], r["last"], r["tokens"], r["loss"]) for r in rows] == [
        (0, 0.25, 2, 2), (0.25, 0.5, 1, 5), (0.75, 1, 1, 7),
    ]  # fmt: skip
    text = image_scores.time_text({"split": "test", "loss": 4.0, "by_time": rows})
    assert text.splitlines()[-1].split() == ["0.75-1.00", "1", "7.0000"]


def test_pictures_are_written(table_WW, tmp_path):
    image_pictures.confusion(table_WW, ("cat", "dog", "owl"), "title", tmp_path / "confusion.png")
    rows = [{"first": 0, "last": 0.5, "loss": 1.0}, {"first": 0.5, "last": 1, "loss": 2.0}]
    image_pictures.loss_by_time(rows, "title", tmp_path / "time.png")
    for name in ("confusion", "time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_a_row_of_samples_per_class(channels, tmp_path):
    """Row r, column c holds the shade 40 r + 10 c, somewhere right of its name."""
    Image = image_files.pillow()
    shades = 40 * np.arange(2)[:, None] + 10 * np.arange(3)[None]
    pixels = np.broadcast_to(shades[..., None, None, None], (2, 3, 4, 4, channels)).astype(np.uint8)
    path = image_pictures.write_samples(pixels, ("cat", "dog"), "title", tmp_path / "samples")
    assert path.name == "samples.png"
    sheet = np.asarray(Image.open(path))[20:, 30:]  # without the text
    rows = [set(np.unique(line[:, 0])) for line in sheet]
    assert any({40, 50, 60} <= row for row in rows) and any({0, 10, 20} <= row for row in rows)
    assert not any({10, 50} <= row for row in rows)


def test_videos_become_a_gif(tmp_path):
    Image = image_files.pillow()
    pixels = np.zeros((2, 3, 5, 4, 4, 1), np.uint8)
    pixels[:, :, 2] = 200
    path = image_pictures.write_samples(pixels, ("cat", "dog"), "title", tmp_path / "samples")
    assert path.name == "samples.gif"
    with Image.open(path) as video:
        assert video.n_frames == 3, "equal frames are one, shown longer"
        durations = []
        for frame in range(video.n_frames):
            video.seek(frame)
            durations.append(video.info["duration"])
    assert durations == [300, 150, 300]
