"""Runs of images through the trainer, and what evaluate, generate and the bench make of them."""

import json

import jax
import numpy as np
import pytest

from configs import digits, digits_denoise, moving_digits
from experiments.benchmarks import vision
from experiments.data.vision import image_files
from experiments.inference import image_samples, image_scores, subjects
from experiments.launch import cli
from experiments.training import loop, run_record
from tests.experiments import tiny


def small(config, steps=2):
    """Shrinks a config of images in place to T = 4 and one narrow layer; returns it."""
    config.data.update({"patch": 4, "batch_size": 8, "eval_batch_size": 64})
    config.model.update({"d_model": 16, "num_layers": 1})
    config.schedule.update({"name": "constant", "warmup_steps": 0})
    config.train.update({"steps": steps, "log_every": 1, "eval_every": 10, "test_batches": 1})
    config.checkpoint.every = 1
    return config


def subject_of(folder, split="test", **changes):
    config = run_record.load_config(folder)
    config.update(changes)
    return subjects.of_run(config, str(folder), split)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    loop.train(small(digits.get_config("attention")), folder, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoiser")
    loop.train(small(digits_denoise.get_config("attention")), folder, jax.devices()[:1])
    return folder


def test_an_encoder_is_scored_by_class(encoder, tmp_path, capsys):
    subject = subject_of(encoder)
    found = image_scores.score(subject, "test", out=tmp_path)
    counts = np.array(found["confusion"])
    assert found["documents"] == counts.sum() == 359
    assert counts.sum(1).tolist() == [row["documents"] for row in found["by_class"]]
    assert counts.sum(1).min() >= 35, "all ten digits are there"
    assert found["accuracy"] == pytest.approx(np.trace(counts) / 359)
    assert json.loads((tmp_path / "evaluation_test.json").read_text())["loss"] == found["loss"]
    assert (tmp_path / "evaluation_test.png").read_bytes().startswith(b"\x89PNG")
    assert f"accuracy {found['accuracy']:.4f}" in capsys.readouterr().out
    # The loss and the accuracy are those that the trainer gives.
    scores = json.loads((encoder / "result.json").read_text())
    first = image_scores.score(subject, "test", max_batches=1, out=None)
    assert first["documents"] == scores["tokens"] == 64
    assert first["loss"] == pytest.approx(scores["loss"], abs=1e-6)
    assert first["accuracy"] == pytest.approx(scores["accuracy"])


def test_a_denoiser_is_scored_by_time(denoiser, tmp_path):
    found = image_scores.score(
        subject_of(denoiser, "validation"), "validation", buckets=4, out=tmp_path
    )
    assert sum(row["tokens"] for row in found["by_time"]) == found["tokens"] == 179 * 4
    total = sum(row["tokens"] * row["loss"] for row in found["by_time"])
    assert found["loss"] == pytest.approx(total / found["tokens"])
    assert (tmp_path / "evaluation_validation.png").read_bytes().startswith(b"\x89PNG")


def test_a_denoiser_draws_a_row_per_class(denoiser, tmp_path):
    config = run_record.load_config(denoiser)
    options = {"count": 3, "sampling_steps": 2, "guidance": 2.0}

    def drawn(name, **more):
        path = image_samples.sample(
            config, str(denoiser), **options, **more, out=tmp_path / "new" / name
        )
        return np.asarray(image_files.pillow().open(path))

    whole, again, other = drawn("a"), drawn("b"), drawn("c", seed=1)
    assert (tmp_path / "new" / "a.png").exists()
    np.testing.assert_array_equal(whole, again)
    assert not np.array_equal(whole, other)
    few = drawn("d", classes=["7", "3"])
    assert few.shape[0] < whole.shape[0] / 4
    with pytest.raises(cli.UserError, match="--classes: unknown 'x'; choose from 0, 1"):
        drawn("e", classes=["x"])
    with pytest.raises(cli.UserError, match="--samples is 0; it must be at least 1"):
        image_samples.sample(config, str(denoiser), count=0, out=tmp_path / "f")


def test_what_needs_another_kind_of_run_is_told(encoder, tmp_path):
    config = run_record.load_config(encoder)
    with pytest.raises(cli.UserError, match="no denoiser; its encoder tells classes: score it"):
        image_samples.sample(config, str(encoder), out=tmp_path / "x")
    with pytest.raises(cli.UserError, match="'digits', is not text: --retrieval needs a language"):
        subjects.of_run(config, str(encoder), None, asked=["retrieval"])
    with pytest.raises(
        ValueError, match=r"grid is \(4, 4\), and the model's .*--config.model.grid="
    ):
        changed = run_record.load_config(encoder)
        changed.data.size = 16
        subjects.of_run(changed, str(encoder), "test")
    with pytest.raises(cli.UserError, match="no denoiser; its language_model continues text"):
        image_samples.sample(tiny.make_config(tmp_path), "nowhere", out=tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("module", [digits, digits_denoise], ids=["encoder", "denoiser"])
def test_resumed_runs_of_packed_images_go_on_exactly(module, tmp_path):
    def trained(folder, *steps):
        for step in steps:
            config = small(module.get_config("linear_attention,pack"), step)
            result = loop.train(config, folder, jax.devices()[:1])
        return result["loss"]

    assert trained(tmp_path / "whole", 4) == trained(tmp_path / "parts", 2, 4)


@pytest.mark.slow
def test_a_denoiser_of_videos_draws_a_gif(tmp_path):
    config = small(moving_digits.get_config("attention,denoise"), 1)
    config.data.update({"frames": 2, "patch": 8, "eval_examples": 8})
    config.model.d_model = 32  # three axes share a head's channels
    loop.train(config, tmp_path, jax.devices()[:1])
    saved = run_record.load_config(tmp_path)
    path = image_samples.sample(saved, str(tmp_path), sampling_steps=2, out=tmp_path / "samples")
    assert path.name == "samples.gif"
    with image_files.pillow().open(path) as video:
        assert video.n_frames == 2


@pytest.mark.slow
def test_the_bench_trains_what_is_missing(tmp_path, monkeypatch):
    """Of a mixer that cannot be trained the table has the reason."""
    said, settings = [], {"argument": "", "steps": 2}
    real = digits.get_config

    def get_config(argument):
        config = small(real("attention" if argument == "mala" else argument))
        if argument == "mala":
            config.model.pattern = "no_such_mixer"
        return config

    monkeypatch.setattr(digits, "get_config", get_config)
    rows = vision.run(["attention", "mala"], 1, settings, tmp_path, said.append)
    assert [row["mixer"] for row in rows] == ["attention", "mala"]
    assert rows[0]["seeds"] == 1 and rows[0]["parameters"] > 100 and not rows[0]["note"]
    assert rows[1]["seeds"] == 0 and "unknown mixer 'no_such_mixer'" in rows[1]["note"]
    assert len(said) == 2
    rows = vision.run(["attention"], 2, settings, tmp_path, said.append)
    assert len(said) == 3 and rows[0]["seeds"] == 2, "the first seed is not trained again"
    assert "| attention | baseline |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="give another --out, or remove it"):
        vision.run(["attention"], 1, {"argument": "pixels", "steps": 2}, tmp_path)


@pytest.mark.slow
def test_flags_of_text_and_of_images_are_told_apart(denoiser, launcher, tmp_path):
    workdir = f"--workdir={denoiser}"
    runs = {
        "draws": [workdir, "--steps=1", f"--out={tmp_path}/drawn"],
        "prompt": [workdir, "--prompt=a"],
        "samples": ["--model=none", "--samples=2"],
    }
    started = {
        name: launcher.start(tmp_path / name, arguments, 1, binary="generate")
        for name, arguments in runs.items()
    }
    codes = {name: processes.wait(300) for name, processes in started.items()}
    assert codes["draws"] == {0: 0} and (tmp_path / "drawn.png").exists()
    assert codes["prompt"] == codes["samples"] == {0: 2}
    assert "--prompt is of text, and the run's model is a denoiser" in started["prompt"].log(0)
    assert "--samples is of images, and the model is a language model" in started["samples"].log(0)
