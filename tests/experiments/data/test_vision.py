"""Datasets of images, videos and point sets: what batches hold, and that reading goes on."""

import io
import itertools
import json
import sys

import numpy as np
import pytest

from experiments.data import make_dataset
from experiments.data.patching import Patching, to_bytes
from experiments.data.vision import digits, digits_source, image_files
from tests.experiments.data_helpers import assert_same, concatenated, take

CASES = {
    "digits": {"name": "digits", "patch": 2, "shift": 1, "noise": 0.1},
    "packed": {"name": "digits", "patch": 4, "pack": 3},
    "denoising": {"name": "digits", "patch": 2, "task": "denoising", "pack": 2},
    "pixels": {"name": "digit_pixels"},
    "moving": {"name": "moving_digits", "frames": 4, "eval_examples": 20, "num_examples": 13},
    "moving_denoising": {
        "name": "moving_digits",
        "frames": 2,
        "digits": 2,
        "task": "denoising",
        "eval_examples": 20,
    },
    "points": {"name": "digit_points", "order": "random", "pack": 2},
}


def batch_of(split="train", **options):
    dataset = make_dataset({"batch_size": 32} | options, split)
    return dataset, next(iter(dataset))


def images_of(dataset, batch):
    """Returns a batch's images in their grey values, (rows, ..., H, W)."""
    return 8 * (dataset.patching.unpatchify(batch["inputs"])[..., 0] + 1)


@pytest.mark.parametrize(
    "sizes, patch, channels", [((4, 6), (2, 3), 1), ((2, 4, 4), (1, 2, 4), 3), ((3, 3), (1, 1), 2)]
)
def test_patches_are_put_together_again(sizes, patch, channels):
    patching = Patching(sizes, patch, channels)
    pixels = np.random.default_rng(0).standard_normal((2, 5, *sizes, channels))
    tokens = patching.patchify(pixels)
    assert tokens.shape == (2, 5, patching.tokens, patching.features)
    np.testing.assert_array_equal(patching.unpatchify(tokens), pixels)
    # Token number i holds the pixels of the patch at i's place on the grid.
    for i in range(patching.tokens):
        place = np.unravel_index(i, patching.grid)
        cut = [slice(a * p, (a + 1) * p) for a, p in zip(place, patch)]
        np.testing.assert_array_equal(tokens[0, 0, i], pixels[(0, 0, *cut)].ravel())


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="digits: patches of 3 x 3 pixels do not divide 8 x 8"):
        make_dataset({"name": "digits", "patch": 3}, "train")
    assert to_bytes(np.array([-2.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


def test_the_split_of_the_digits_is_stratified_and_whole():
    parts = [digits_source.split_numbers(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1259, 179, 359]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    labels = digits_source.load()[1]
    shares = [np.bincount(labels[part]) / len(part) for part in parts]
    assert np.ptp(shares, axis=0).max() < 0.01


def test_digits_are_the_images_of_the_split():
    dataset, batch = batch_of("test", name="digits", patch=2)
    assert dataset.grid == (4, 4) and dataset.input_dim == 4 and dataset.num_classes == 10
    images, labels = digits_source.read("test")
    found = images_of(dataset, batch)
    known = {image.tobytes(): label for image, label in zip(images, labels)}
    for image, label_T in zip(found.astype(np.float32), batch["labels"]):
        assert known[image.tobytes()] == label_T[0] and len(set(label_T)) == 1
    assert batch["loss_mask"].tolist() == [[1.0] + 15 * [0.0]] * 32
    assert batch["inputs"].min() == -1 and batch["inputs"].max() == 1


def test_training_images_are_moved_and_noisy_and_held_out_ones_are_not():
    options = {"name": "digits", "shift": 2}
    plain, moved = (batch_of("validation", **o)[1] for o in ({"name": "digits"}, options))
    assert_same([plain], [moved])
    (dataset, plain), (_, moved) = batch_of(name="digits"), batch_of(**options)
    for a, b in zip(images_of(dataset, plain), images_of(dataset, moved)):
        shifted = [
            digits.moved(a / 8 - 1, by) * 8 + 8 for by in itertools.product(range(-2, 3), repeat=2)
        ]
        assert any(np.allclose(b, c) for c in shifted)
    assert not np.array_equal(plain["inputs"], moved["inputs"])
    noisy = batch_of(name="digits", noise=0.5)[1]["inputs"] - plain["inputs"]
    assert abs(noisy.std() - 0.5) < 0.02


def test_resized_digits():
    image = np.arange(64.0, dtype=np.float32).reshape(1, 8, 8)
    np.testing.assert_array_equal(
        digits.resized(image, 16, "nearest"), image.repeat(2, 1).repeat(2, 2)
    )
    up = digits.resized(image, 16, "bilinear")
    assert up[0, 0, 0] == 0 and up[0, 1, 1] == pytest.approx(0.25 * (1 + 8))
    np.testing.assert_allclose(digits.resized(image, 4, "bilinear")[0, 1:3, 1:3], [[22.5, 24.5], [38.5, 40.5]])  # fmt: skip
    Image = image_files.pillow()
    drawn = digits_source.load()[0][7]
    for size in (4, 12, 16):
        expected = np.asarray(Image.fromarray(drawn).resize((size, size), Image.BILINEAR))
        np.testing.assert_allclose(
            digits.resized(drawn[None], size, "bilinear")[0], expected, atol=1e-4
        )
    dataset, batch = batch_of(name="digits", size=16, patch=2)
    assert dataset.grid == (8, 8) and batch["inputs"].shape == (32, 64, 4)


def test_pixels_are_ids_with_the_label_at_the_last():
    dataset, batch = batch_of("test", name="digit_pixels", pack=2, batch_size=8)
    pixels, whole = batch_of("test", name="digits", batch_size=16)
    assert dataset.vocab_size == 17 and dataset.grid is None and dataset.num_classes == 10
    np.testing.assert_array_equal(
        batch["inputs"].reshape(16, 8, 8), images_of(pixels, whole).round()
    )
    np.testing.assert_array_equal(batch["labels"][:, 63::64].ravel(), whole["labels"][:, 0])
    assert np.flatnonzero(batch["loss_mask"].any(0)).tolist() == [63, 127]
    assert batch["segment_ids"][0].tolist() == 64 * [1] + 64 * [2]


def test_denoising_draws_noise_time_and_hidden_classes():
    options = {"name": "digits", "patch": 4, "task": "denoising", "label_dropout": 0.3}
    dataset = make_dataset(options | {"batch_size": 400, "pack": 2}, "train")
    batch, later = take(iter(dataset), 2)
    documents = {name: batch[name].reshape(800, 4, -1) for name in ("time", "labels", "noise")}
    for name in ("time", "labels"):
        assert (documents[name] == documents[name][:, :1]).all(), "one per document"
    time = documents["time"][:, 0]
    assert 0 <= time.min() < 0.01 and 0.99 < time.max() <= 1 and abs(time.mean() - 0.5) < 0.03
    assert abs(batch["noise"].std() - 1) < 0.02 and abs(batch["noise"].mean()) < 0.02
    assert abs((documents["labels"][:, 0] == -1).mean() - 0.3) < 0.05
    assert batch["loss_mask"].all() and not np.array_equal(batch["noise"], later["noise"])
    held_out = batch_of("test", **options)[1]
    assert held_out["labels"].min() >= 0 and held_out["noise"].shape == held_out["inputs"].shape


def test_moving_digits_move_and_bounce():
    dataset, batch = batch_of(name="moving_digits", frames=20, label="direction", patch=2)
    assert dataset.grid == (20, 8, 8) and dataset.num_classes == 8
    steps = dict(enumerate([(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]))
    originals = {image.tobytes() for image in digits_source.read("train")[0]}
    turned = 0
    for video, label in zip(images_of(dataset, batch).round(), batch["labels"][:, 0]):
        places = [
            next(
                (y, x)
                for y, x in itertools.product(range(9), repeat=2)
                if frame[y : y + 8, x : x + 8].sum() == frame.sum()
                and frame[y : y + 8, x : x + 8].astype(np.float32).tobytes() in originals
            )
            for frame in video
        ]
        moves = np.diff(places, axis=0)
        along = np.abs(steps[label])
        assert (np.abs(moves) == along).all(), "one pixel per frame, turning at the edges"
        changes = (moves[1:] != moves[:-1]).any(axis=1)
        turned += changes.sum()
        assert all({0, 8} & set(places[t + 1]) for t in np.flatnonzero(changes))
        if 0 < places[0][0] < 8 and 0 < places[0][1] < 8:
            assert tuple(moves[0]) == steps[label]
    assert turned > 30


def test_two_moving_digits_are_named_by_their_pair():
    dataset, batch = batch_of(name="moving_digits", digits=2, frames=2)
    assert dataset.num_classes == 55 and dataset.class_names[:2] == ("00", "01")
    assert len(set(batch["labels"][:, 0])) > 10
    one, video = batch_of(name="moving_digits", frames=2)
    assert images_of(dataset, batch).mean() > 1.5 * images_of(one, video).mean()


def test_points_are_the_lit_pixels():
    dataset, batch = batch_of("test", name="digit_points")
    pixels, whole = batch_of("test", name="digits")
    for row, image in enumerate(images_of(pixels, whole)):
        valid = batch["segment_ids"][row] > 0
        drawn = np.zeros((8, 8))
        y, x = batch["coordinates"][row, valid].T
        drawn[y, x] = 8 * (batch["inputs"][row, valid, 0] + 1)
        np.testing.assert_allclose(drawn, image, atol=1e-5)
        np.testing.assert_allclose(batch["inputs"][row, valid, 1], y / 3.5 - 1, atol=1e-6)
    shuffled = batch_of("test", name="digit_points", order="random")[1]
    assert not np.array_equal(shuffled["coordinates"], batch["coordinates"])
    for a, b in zip(shuffled["coordinates"], batch["coordinates"]):
        assert sorted(map(tuple, a)) == sorted(map(tuple, b))
    assert dataset.input_dim == 3 and dataset.grid is None


@pytest.mark.parametrize("case", CASES)
class TestEveryDataset:
    def test_batches_and_padding(self, case):
        dataset = make_dataset(CASES[case] | {"batch_size": 7, "eval_batch_size": 7}, "test")
        whole = list(dataset)
        assert dataset.chance == 1 / dataset.num_classes == 1 / len(dataset.class_names)
        shape = whole[0]["inputs"].shape[:2]
        assert shape[0] == 7
        for batch in whole:
            assert all(array.shape[:2] == shape for array in batch.values())
            assert {array.dtype.name for array in batch.values()} == {"int32", "float32"}
            padding = batch["segment_ids"] == 0
            assert not any(array[padding].any() for array in batch.values())
        documents = sum(batch["segment_ids"].max(1).sum() for batch in whole)
        expected = 20 if "moving" in case else 359
        assert documents == expected
        if "denoising" not in case:
            assert sum(batch["loss_mask"].sum() for batch in whole) == expected
        assert_same(list(dataset), whole)
        other_seed = make_dataset(CASES[case] | {"batch_size": 7, "seed": 5}, "test")
        assert_same(list(other_seed), whole)

    def test_resume_is_exact(self, case):
        dataset = make_dataset(CASES[case] | {"batch_size": 4}, "train")
        whole, iterator = take(iter(dataset), 8), iter(dataset)
        take(iterator, 3)
        restored = iter(dataset)
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        assert_same(take(restored, 5), whole[3:])
        other = next(iter(make_dataset(CASES[case] | {"batch_size": 4, "seed": 1}, "train")))
        assert not np.array_equal(other["inputs"], whole[0]["inputs"])

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_processes_share_out_the_batch_of_one(self, case, split):
        config = CASES[case] | {"batch_size": 6}
        one = take(iter(make_dataset(config, split)), 4)
        parts = [
            take(iter(make_dataset(config, split, process_index=i, process_count=3)), 4)
            for i in range(3)
        ]
        assert_same(concatenated(*parts), one)


def test_another_batch_size_goes_on_with_the_next_image():
    config = CASES["packed"]
    whole = iter(make_dataset(config | {"batch_size": 2}, "train"))
    other = iter(make_dataset(config | {"batch_size": 6}, "train"))
    take(whole, 5)
    other.set_state(json.loads(json.dumps(whole.get_state())))
    three = take(whole, 3)
    assert_same([next(other)], [{k: np.concatenate([b[k] for b in three]) for k in three[0]}])


def test_an_epoch_has_every_image_once_in_another_order():
    dataset = make_dataset({"name": "digits", "batch_size": 1259, "patch": 8}, "train")
    first, second = (batch["inputs"][:, 0] for batch in take(iter(dataset), 2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(*(np.unique(x, axis=0) for x in (first, second)))


def test_videos_that_come_back_are_the_same():
    config = CASES["moving"] | {"batch_size": 13, "task": "denoising"}
    first, second = take(iter(make_dataset(config, "train")), 2)
    assert {x.tobytes() for x in first["inputs"]} == {x.tobytes() for x in second["inputs"]}
    assert not {x.tobytes() for x in first["noise"]} & {x.tobytes() for x in second["noise"]}


def write_images(folder, count, classes=("cat", "dog"), size=(6, 5)):
    """Writes `count` PNG files per class: class c's image number i is grey 100 c + i."""
    Image = image_files.pillow()
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (100 * c + i,) * 3).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("grey", [True, False])
def test_images_of_a_folder(grey, tmp_path):
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        write_images(tmp_path / split, count)
    config = {"name": "images", "folder": str(tmp_path), "size": 8, "grey": grey, "batch_size": 3}
    dataset = make_dataset(config, "test")
    assert dataset.class_names == ("cat", "dog") and dataset.grid == (2, 2)
    assert dataset.input_dim == 16 * (1 if grey else 3)
    found = set()
    for batch in dataset:
        pixels = to_bytes(dataset.patching.unpatchify(batch["inputs"]))
        for image, label, segment in zip(pixels, batch["labels"][:, 0], batch["segment_ids"]):
            if segment[0]:
                assert len(np.unique(image)) == 1
                found.add((int(label), int(image.flat[0])))
    assert found == {(c, 100 * c + i) for c in (0, 1) for i in range(3)}
    next(iter(make_dataset(config | {"flip": True, "task": "denoising"}, "train")))


def test_images_of_a_folder_without_splits_are_shared_out_by_name(tmp_path):
    write_images(tmp_path, 60)
    config = {"name": "images", "folder": str(tmp_path), "size": 4, "batch_size": 1}
    counts = [len(list(make_dataset(config, split))) for split in ("validation", "test")]
    assert all(1 <= count <= 20 for count in counts)
    write_images(tmp_path / "few", 1)
    with pytest.raises(ValueError, match="no images for the test split.*make folders train"):
        make_dataset(config | {"folder": str(tmp_path / "few")}, "test")
    with pytest.raises(ValueError, match="has 0 folders of classes"):
        make_dataset(config | {"folder": str(tmp_path / "cat")}, "train")
    with pytest.raises(ValueError, match="which is no folder"):
        make_dataset(config | {"folder": str(tmp_path / "none")}, "train")
    with pytest.raises(ValueError, match="give one of config.data.folder"):
        make_dataset({"name": "images"}, "train")


def test_images_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    from experiments.data import tfds_source

    Image, features = image_files.pillow(), tfds.features

    class Shades(tfds.core.GeneratorBasedBuilder):
        """Image i is grey 10 i, of class i mod 2."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            classes = features.ClassLabel(names=["even", "odd"])
            found = features.FeaturesDict({"image": features.Image(), "label": classes})
            return tfds.core.DatasetInfo(builder=self, description=__doc__, features=found)

        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                file = io.BytesIO()
                Image.new("RGB", (5, 6), (10 * i,) * 3).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 2}

    builder = Shades(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    with tfds_source.quiet():
        builder.download_and_prepare()
    config = {"name": "images", "tfds_name": "shades", "data_dir": str(tmp_path / "tfds")}
    config |= {"size": 4, "grey": True, "batch_size": 4}
    dataset = make_dataset(config, "test")
    (batch,) = dataset
    pixels = to_bytes(dataset.patching.unpatchify(batch["inputs"]))
    shades = sorted(zip(pixels[:, 0, 0, 0].tolist(), batch["labels"][:, 0].tolist()))
    assert shades == [(0, 0), (10, 1), (20, 0), (30, 1)]
    assert dataset.class_names == ("even", "odd")
    with pytest.raises(ValueError, match="no image feature 'label'; its image features are image"):
        make_dataset(config | {"image_key": "label"}, "test")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "digits", "task": "naming"}, "digits: unknown task='naming'; the choices are cl"),
        ({"name": "digits", "pack": 0}, "pack must be at least 1"),
        ({"name": "digits", "label_dropout": 2.0}, "label_dropout must lie in"),
        ({"name": "digits", "resize": "cubic"}, "the choices are bilinear, nearest"),
        ({"name": "digits", "shift": 8}, "from 0 to size - 1 = 7"),
        ({"name": "digits", "noise": -1.0}, "noise must be 0 or more"),
        ({"name": "digit_pixels", "pack": 0}, "at least 1 image per row"),
        ({"name": "moving_digits", "digits": 3}, "digits must be 1 or 2"),
        ({"name": "moving_digits", "label": "speed"}, "the choices are digit, direction"),
        ({"name": "moving_digits", "size": 8}, "by 1 to size - 8 = 0 pixels"),
        ({"name": "moving_digits", "frames": 3, "patch_frames": 2}, "2 x 4 x 4 pixels do not"),
        ({"name": "moving_digits", "eval_examples": 0}, "eval_examples at least 1"),
        ({"name": "digit_points", "task": "denoising"}, "digit_points has no denoising"),
        ({"name": "digit_points", "order": "columns"}, "the choices are rows, random"),
        ({"name": "digit_points", "threshold": 17}, "from 1 to 8"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(options, "train")


@pytest.mark.parametrize("package", ["sklearn", "PIL"])
def test_a_missing_extra_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    digits_source.load.cache_clear()
    call = digits_source.load if package == "sklearn" else image_files.pillow
    with pytest.raises(ValueError, match=r"pip install '.\[vision\]'"):
        call()
