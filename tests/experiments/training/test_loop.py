import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.data import baselines, make_dataset
from experiments.launch import cli
from experiments.training import checkpoints, evaluation, loop, metrics, run_record, steps, summary
from tests.experiments import processes, tiny

ONE_DEVICE = slice(0, 1)


def train(config, workdir, devices=ONE_DEVICE):
    return loop.train(config, workdir, jax.devices()[devices])


def steps_of(workdir):
    return [row for row in metrics.read_metrics(workdir) if "loss" in row]


def saved_params(config, workdir):
    """Returns the last checkpoint's arrays, as numpy, and its data position."""
    found = checkpoints.Checkpoints(workdir, training=False)
    step = found.latest_step()
    config = loop.resolve(config, make_dataset(config.data, "train"))
    program = steps.build(config, config.data.seq_len, jax.devices()[ONE_DEVICE])
    parts = found.restore_parts(step, program.abstract_state, ("params", "training"))
    data = (found.path(step) / "data" / "share_0_of_1.json").read_text()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)], data


def assert_same_end(config, workdir, other):
    leaves, data = saved_params(config, workdir)
    expected_leaves, expected_data = saved_params(config, other)
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert data == expected_data
    exact = ("step", "loss", "accuracy", "grad_norm", "param_norm", "learning_rate")
    for row, expected in zip(steps_of(workdir), steps_of(other), strict=True):
        assert [row[name] for name in exact] == [expected[name] for name in exact]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Returns (config, workdir, result) of a run of six steps, with a checkpoint at three."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny.make_config(folder)
    config.sample.update({"prompt": "12", "length": 5})
    return config, folder / "run", train(config, folder / "run")


def test_leaves_its_record(whole_run):
    config, workdir, result = whole_run
    rows = metrics.read_metrics(workdir)
    assert [row["step"] for row in steps_of(workdir)] == [1, 2, 3, 4, 5, 6]
    assert steps_of(workdir)[-1]["loss"] < steps_of(workdir)[0]["loss"]
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "tokens_per_second"} <= rows[2].keys()
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert [row["step"] for row in rows if "test_loss" in row] == [6]

    assert json.loads((workdir / "result.json").read_text()) == result
    bytes_scored = result["bytes"]
    # One batch of the test split was scored: the baselines are of the same documents.
    assert set(result["baselines_bits_per_byte"]) == {"gzip -9", "byte bigram"}
    test_set = make_dataset(config.data, "test")
    batch = next(iter(test_set))
    labels = batch["labels"][batch["loss_mask"] > 0]
    scored = labels[labels < 256].astype(np.uint8).tobytes()
    # Ends of documents cost bits, and are no bytes.
    assert len(scored) == bytes_scored and len(labels) == result["tokens"]
    bits = result["loss"] * result["tokens"] / np.log(2)
    np.testing.assert_allclose(result["bits_per_byte"], bits / bytes_scored, rtol=1e-9)
    of_corpus = summary.scored_bytes(data.documents(config.data, "test"), bytes_scored)
    assert sorted(b"".join(of_corpus)) == sorted(scored)
    gzip = baselines.gzip_bits_per_byte(of_corpus)
    assert result["baselines_bits_per_byte"]["gzip -9"] == gzip
    assert result["sample"].startswith("12")
    assert Path(result["checkpoint"]).is_dir()
    assert Path(result["loss_curve"]).read_bytes().startswith(b"\x89PNG")

    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 257 and saved["train"]["steps"] == 6
    (start,) = json.loads((workdir / "run.json").read_text())
    assert start["versions"]["jax"] == jax.__version__
    assert len(start["git"]["commit"]) == 40 and start["git"]["dirty"] in (True, False)


@pytest.mark.slow
def test_a_model_learns_where_documents_end(tmp_path):
    """Every document is "abab.", so that its end is as sure as its letters."""
    config = tiny.make_config(tmp_path)
    (tmp_path / "text.txt").write_text("abab.\n" * 900)
    config.data.documents = "lines"
    config.train.update({"steps": 60, "log_every": 60, "eval_every": 60, "test_batches": 0})
    config.sample.update({"prompt": "ab", "length": 20, "temperature": 0.0})
    result = train(config, tmp_path / "run")
    assert result["sample"] == "abab."
    assert result["accuracy"] > 0.9  # 5/6 without the ends; not 1, as rows may begin with a "b"
    assert result["tokens"] * 5 == result["bytes"] * 6  # five bytes and an end each


def test_three_steps_and_three_more_are_six_bit_for_bit(whole_run, tmp_path, capfd):
    config, whole, _ = whole_run

    def stop_at_three(self, step):
        self.signal = signal.SIGTERM
        return step == 3

    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Stopped) as stop:
        patch.setattr(loop.StopSignals, "requested", stop_at_three)
        train(config, tmp_path)
    assert stop.value.code == 143
    assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3]
    with (tmp_path / metrics.FILE_NAME).open("a") as file:  # as if it had gone on, and was killed
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    train(config, tmp_path)
    assert f"resuming from {tmp_path / 'checkpoints' / '3'}" in capfd.readouterr().err
    assert_same_end(config, tmp_path, whole)
    # The evaluation that was due when it was stopped is made up for, in its place.
    scores, expected = (
        [(row["step"], row.get("validation_loss")) for row in metrics.read_metrics(workdir)]
        for workdir in (tmp_path, whole)
    )
    assert scores == expected and [step for step, loss in scores if loss] == [3, 6]


def stopped_after_3(config, whole, workdir):
    """Makes `workdir` the run as it stood before its last checkpoint. Returns its config."""
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    return config.copy_and_resolve_references()


def test_goes_on_with_another_batch_size(whole_run, tmp_path, capfd, caplog):
    config, whole, _ = whole_run
    config = stopped_after_3(config, whole, tmp_path / "run")
    config.data.batch_size = 4
    train(config, tmp_path / "run")
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "config.data.batch_size: 8 -> 4" in capfd.readouterr().err
    assert "goes on in 4 lanes of 8: what the others had begun" in caplog.text
    _, data = saved_params(config, tmp_path / "run")
    assert list(json.loads(data)["lanes"].values()) == [8, 4]


def test_other_text_is_refused_unless_it_is_said_to_be_new(whole_run, tmp_path):
    config, whole, _ = whole_run
    config = stopped_after_3(config, whole, tmp_path / "run")
    config.data.document_bytes = 300
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="train split of text has changed .* --new_data"):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before
    loop.train(config, tmp_path / "run", jax.devices()[ONE_DEVICE], new_data=True)
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_sigterm_saves_and_exits(whole_run, tmp_path):
    config = whole_run[0].copy_and_resolve_references()
    config.checkpoint.every = 100
    write = metrics.MetricWriter.write

    def kill_after_step_2(self, step, **values):
        write(self, step, **values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Stopped) as stop:
        patch.setattr(metrics.MetricWriter, "write", kill_after_step_2)
        train(config, tmp_path)
    assert stop.value.code == 143
    saved = checkpoints.Checkpoints(tmp_path, training=False).steps()
    assert saved == [steps_of(tmp_path)[-1]["step"]] and saved[0] in (3, 4)
    assert signal.getsignal(signal.SIGTERM) == before


def test_changed_fields_are_named_on_resuming(whole_run, tmp_path, capfd):
    config, whole, _ = whole_run
    config = stopped_after_3(config, whole, tmp_path / "run")
    config.train.log_every = 2
    train(config, tmp_path / "run")
    errors = capfd.readouterr().err
    assert "changed since this run was started: config.train.log_every: 1 -> 2\n" in errors
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 6]
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[1]["config_changes"] == ["config.train.log_every: 1 -> 2"]


def test_goes_on_from_a_config_that_an_older_version_saved(whole_run, tmp_path):
    """Its `parallel.collective` was called `parallel.exchange`; the run goes on, as it was."""
    config, whole, _ = whole_run
    config = stopped_after_3(config, whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    saved["parallel"]["exchange"] = saved["parallel"].pop("collective")
    path.write_text(json.dumps(saved))
    assert run_record.load_config(tmp_path / "run").parallel.collective == "all_gather"
    train(config, tmp_path / "run")
    assert_same_end(config, tmp_path / "run", whole)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert starts[1]["step"] == 3 and starts[1]["config_changes"] == []
    assert "exchange" not in json.loads(path.read_text())["parallel"]


def test_a_checkpoint_of_another_model_is_refused_and_stays(whole_run, tmp_path):
    config, whole, _ = whole_run
    shutil.copytree(whole, tmp_path / "run")
    config = config.copy_and_resolve_references()
    config.model.d_ff = 24
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"another model") as error:
        train(config, tmp_path / "run")
    assert "channel_mixer/up/kernel: checkpoint (16, 16), this config (16, 24)" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert checkpoints.Checkpoints(tmp_path / "run").steps() == [3, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(whole_run, tmp_path):
    config = whole_run[0].copy_and_resolve_references()
    config.checkpoint.every = 1
    build = steps.build

    def build_with_a_bad_third_step(*arguments):
        program = build(*arguments)
        good_step = program.train_step

        def train_step(state, batch):
            if int(state.step) == 2:
                batch = batch | {"loss_mask": batch["loss_mask"] * np.nan}
            return good_step(state, batch)

        object.__setattr__(program, "train_step", train_step)
        return program

    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.NonFiniteLoss) as error:
        patch.setattr(steps, "build", build_with_a_bad_third_step)
        train(config, tmp_path)
    assert "step 3 is not finite" in str(error.value) and "learning_rate" in str(error.value)
    assert str(tmp_path / "checkpoints" / "2") in str(error.value)
    assert checkpoints.Checkpoints(tmp_path, training=False).steps() == [1, 2]
    assert all(np.isfinite(leaf).all() for leaf in saved_params(config, tmp_path)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, devices",
    [
        ({"train.accumulate": 4}, ONE_DEVICE),
        ({"mesh.data": 2, "mesh.fsdp": 4}, slice(8)),
        pytest.param({"mesh.data": 8}, slice(8), marks=pytest.mark.slow),
        pytest.param({"mesh.data": 2, "train.accumulate": 4}, slice(2), marks=pytest.mark.slow),
    ],
    ids=["accumulation", "data and fsdp", "data", "data and accumulation"],
)
def test_gives_the_losses_of_one_device_and_one_batch(whole_run, tmp_path, change, devices):
    config, whole, result = whole_run
    config = config.copy_and_resolve_references()
    config.mesh.data = -1
    config.update_from_flattened_dict(change)
    other = train(config, tmp_path, devices)
    for row, expected in zip(steps_of(tmp_path), steps_of(whole), strict=True):
        for name in ("loss", "accuracy", "grad_norm", "param_norm"):
            np.testing.assert_allclose(row[name], expected[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(other["loss"], result["loss"], rtol=2e-5)


def test_fsdp_splits_parameters_and_optimizer_state(tmp_path):
    config = tiny.make_config(tmp_path)
    config.mesh.update({"data": 2, "fsdp": 4})
    config = loop.resolve(config, make_dataset(config.data, "train"))
    state = steps.build(config, 32).abstract_state
    embedding = state.params["embed"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == (257, 4)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (257, 16)]
    assert len(moments) == 2
    assert all(leaf.sharding.shard_shape(leaf.shape) == (257, 4) for leaf in moments)


def test_the_logits_are_never_held(tmp_path):
    """A step on 65536 tokens of 8192 words is compiled to less memory than half their logits."""
    config = tiny.make_config(tmp_path, vocab_size=8192, pattern="linear_attention(num_heads=2)")
    config.data.batch_size = 1
    B, T = 1, 65536
    program = steps.build(config, T, jax.devices()[:1])
    int_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = {"inputs": int_BT, "labels": int_BT, "segment_ids": int_BT}
    batch["loss_mask"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    step = program.train_step.lower(program.abstract_state, batch).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * B * T * 8192 / 2


def test_mistakes_are_found_before_anything_is_written(tmp_path):
    for change, message in [
        ({"optimizer.name": "adma"}, "unknown optimizer 'adma'"),
        ({"train.accumulate": 3}, "accumulate is 3; it must divide data.batch_size, which is 8"),
        ({"mesh.fsdp": 3}, "does not fit"),
        ({"model.pattern": "mamba99"}, "unknown mixer 'mamba99'"),
        ({"model.vocab_size": 100}, "vocab_size is 100.*256"),
        ({"checkpoint.keep": 0}, "checkpoint.keep is 0"),
        ({"checkpoint.every": 0}, "checkpoint.every is 0; it must be at least 1"),
        ({"train.log_every": 0}, "train.log_every is 0; it must be at least 1"),
        ({"train.eval_every": 0}, "train.eval_every is 0; it must be at least 1"),
        ({"train.eval_batches": -1}, "train.eval_batches is -1; it must be at least 0"),
        ({"train.z_loss": -0.5}, "train.z_loss is -0.5; it must be at least 0"),
        ({"sample.length": -1}, "sample.length is -1; it must be at least 0"),
        ({"optimizer.clip": -1.0}, "optimizer.clip is -1.0; it must be positive, or 0"),
        ({"model.num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"model.d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"model.learned_positions": 31}, "rows of 32 tokens, and the model has learned 31 pos"),
        ({"sample.length": 5, "sample.temperature": -1.0}, "temperature is -1"),
        (
            {"sample.length": 9, "model.pattern": "attention(num_heads=2, max_length=8)"},
            "config.sample: 1 prompt tokens and 9 more do not fit",
        ),
    ]:
        config = tiny.make_config(tmp_path, learned_positions=None)
        config.update_from_flattened_dict(change)
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_schedule_free_trains_and_is_evaluated_by_its_average(tmp_path):
    config = tiny.make_config(tmp_path)
    config.optimizer.name, config.schedule.name = "schedule_free", "constant"
    result = train(config, tmp_path / "run")
    validation = metrics.read_metrics(tmp_path / "run")
    assert np.isfinite(result["loss"])
    config = loop.resolve(config, make_dataset(config.data, "train"))
    program = steps.build(config, 32, jax.devices()[ONE_DEVICE])
    found = checkpoints.Checkpoints(tmp_path / "run", training=False)
    parts = found.restore_parts(6, program.abstract_state, ("params", "training"))
    average = program.evaluation_params(parts["params"], parts["training"]["opt_state"])
    dataset = make_dataset(config.data, "validation")
    of_average, of_iterate = (
        evaluation.evaluate(program, params, dataset, 1).totals()["loss"]
        for params in (average, parts["params"])
    )
    assert of_average != of_iterate
    last = [row["validation_loss"] for row in validation if "validation_loss" in row][-1]
    np.testing.assert_allclose(last, of_average, rtol=1e-6)


def newest_step(folder):
    return max((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), default=0)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path, launcher):
    """Kills it over and over, every other time in the middle of a save, until it is through."""

    def start(workdir):
        run = launcher.start(tmp_path / "logs", [*arguments, f"--workdir={workdir}"], 1)
        return run.started[0]

    often = {"train.steps": 40, "checkpoint.every": 1, "checkpoint.keep": 3}
    arguments = [f"--config={processes.config_file(tmp_path)}"]
    arguments += [f"--config.{name}={value}" for name, value in often.items()]
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    folder = tmp_path / "killed" / "checkpoints"
    kills = unfinished = 0
    while True:
        process = start(tmp_path / "killed")
        seen = newest_step(folder)
        while process.is_alive():
            saving = any(folder.glob("*.orbax-checkpoint-tmp*"))
            if newest_step(folder) >= seen + 5 and (saving or kills % 2):
                if not saving:
                    time.sleep(0.013 * (kills % 7))  # each time at another moment
                process.kill()
                kills += 1
                break
            time.sleep(0.003)
        process.join()
        unfinished += any(folder.glob("*.orbax-checkpoint-tmp*"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 5 and unfinished >= 1
    config = tiny.make_config(tmp_path)
    assert_same_end(config, tmp_path / "killed", tmp_path / "whole")
    assert not any((tmp_path / "killed" / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
