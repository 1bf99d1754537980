"""Encoders and denoisers through the one trainer: every field of theirs, by flags, and a resume.

A resumed run ends bit for bit where the whole one does, statistics of batches included.
"""

import json
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import make_dataset
from experiments.training import (
    checkpoints,
    evaluation,
    loop,
    restore,
    run_record,
    steps,
    summary,
    tasks,
)
from seqmodels import encoder, models
from seqmodels.modules import channel_mixers, diffusion, norms
from tests.experiments import called

pytest.importorskip("sklearn")  # the extra [vision], whose digits these are

CONFIGS = {"encoder": "digits.py:linear_attention", "denoiser": "digits_denoise.py:slab"}
SMALL = {
    "model.d_model": 16, "model.d_ff": 16, "model.num_layers": 2, "data.batch_size": 16,
    "data.eval_batch_size": 16, "schedule.warmup_steps": 0, "train.steps": 4, "train.log_every": 1,
    "train.eval_every": 4, "train.eval_batches": 1, "train.test_batches": 1,
    "checkpoint.every": 2, "checkpoint.keep": 2, "mesh.data": 1,
}  # fmt: skip
GRID = {
    "grid": [None, (4, 4)],
    "input_dim": [0, 4],
    "num_classes": [0, 10],
    "position_embedding": list(encoder.POSITIONS),
    "position_conv": [3, None],
    "norm": [
        "prepbn(steps=2)", "layer_norm(use_scale=False, use_bias=False)", "rep_bn", "batch_norm"
    ],
    "scan_layers": [True, False],
}  # fmt: skip
FIELDS = {
    "encoder": GRID | {"pooling": ["mean", "token"], "vocab_size": [0]},
    "denoiser": GRID
    | {
        "objective": ["noise", "velocity"],
        "noise_schedule": [*diffusion.SCHEDULES, *diffusion.SCHEDULES],
        "learn_variance": [True, False],
    },
}
RUNS = max(len(values) for fields in FIELDS.values() for values in fields.values())
# Microbatches and devices of the runs, by their number.
STEPS = [
    {"train.accumulate": 2, "mesh.data": 2, "mesh.fsdp": 4},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.seq": 2},
    {"optimizer.name": "schedule_free", "data.pack": 2, "mesh.data": 8},
    {"model.remat": "full", "data.patch": 1, "model.grid": None, "model.input_dim": 0}
    | {"mesh.data": 4, "mesh.tensor": 2},
]


def values_of(architecture: str, number: int) -> dict:
    fields = FIELDS[architecture]
    chosen = {f"model.{name}": values[number % len(values)] for name, values in fields.items()}
    return SMALL | chosen | STEPS[number % len(STEPS)]


def test_every_field_has_a_value_here():
    for architecture, fields in FIELDS.items():
        shared = models.fields_of("language_model").keys() - {"vocab_size"}
        own = models.fields_of(architecture).keys() - shared
        assert own == fields.keys() - {"norm", "scan_layers"}
    assert {text.partition("(")[0] for text in GRID["norm"]} >= norms.BATCH_NORMS.keys()


def saved_leaves(config, workdir):
    found = checkpoints.Checkpoints(workdir, training=False)
    config = loop.resolve(config, make_dataset(config.data, "train"))
    program = steps.build(config, 64 // config.data.patch**2 * config.data.pack)
    names = ("params", "training", *["collections"] * bool(program.abstract_state.collections))
    parts = found.restore_parts(found.latest_step(), program.abstract_state, names)
    return program, {path: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parts)}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
@pytest.mark.parametrize("architecture", FIELDS)
def test_trains_and_resumes_bit_for_bit(architecture, number, tmp_path):
    values = values_of(architecture, number)
    flags = [f"--config.{name}={value}" for name, value in values.items() if value is not None]
    whole, again = tmp_path / "whole", tmp_path / "again"
    called.run(CONFIGS[architecture], whole, *flags)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")
    called.run(CONFIGS[architecture], again, *flags)

    result = json.loads((again / "result.json").read_text())
    assert result["steps"] == 4 and math.isfinite(result["loss"])
    assert result["loss"] == json.loads((whole / "result.json").read_text())["loss"]
    told = {"encoder": "nats per label, accuracy 0", "denoiser": "squared error per channel, over"}
    assert result["architecture"] == architecture and told[architecture] in summary.text(result)
    config = run_record.load_config(whole)
    program, expected = saved_leaves(config, whole)
    for path, leaf in saved_leaves(config, again)[1].items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    counts = [leaf for path, leaf in expected.items() if "count" in str(path[-1]) and "rep" not in
              str(path) and "collections" in str(path)]  # fmt: skip
    assert all((leaf == 4 * values.get("train.accumulate", 1)).all() for leaf in counts)
    assert bool(counts) == (values["model.norm"] == "prepbn(steps=2)")

    # A reader of the checkpoint scores as the run did.
    _, evaluated = restore.evaluation_params(program, config, whole)
    scores = evaluation.evaluate(program, evaluated, make_dataset(config.data, "test"), 1).totals()
    np.testing.assert_allclose(scores["loss"], result["loss"], rtol=1e-6)
    variables = program.variables(evaluated)
    assert ("batch_stats" in variables) == norms.uses_tokens(values["model.norm"])


class Balanced(nn.Module):
    """A channel mixer that sows a loss: 2 in each layer."""

    @nn.compact
    def __call__(self, x_BTD):
        self.sow("losses", "balance", jnp.float32(2.0))
        return nn.Dense(x_BTD.shape[-1], name="up")(x_BTD)


@pytest.fixture
def balanced(monkeypatch):
    def make(text, *, name=None, parent=nn.module._unspecified_parent, **keywords):
        return Balanced(name=name, parent=parent)

    monkeypatch.setattr(channel_mixers, "make", make)


@pytest.mark.parametrize("config", ["quickstart.py:smoke", "digits.py:linear_attention"])
def test_sown_losses_of_scanned_layers_are_added_and_logged(config, balanced):
    own = {"model.num_layers": 3, "model.vocab_size": 9} if "quick" in config else SMALL
    config = called.read(config, *(f"--config.{k}={v}" for k, v in own.items()))
    config.model.pattern = "linear_attention(num_heads=2)"
    if config.model.architecture == "encoder":
        config = loop.resolve(config, make_dataset(config.data, "train"))
    T = 16
    task = tasks.of_config(config, T)
    rng = np.random.default_rng(0)
    batch = {"labels": rng.integers(0, 9, (2, T)), "segment_ids": np.ones((2, T), np.int32)}
    batch["inputs"] = batch["labels"] if "vocab_size" in str(own) else rng.random((2, T, 4))
    params = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0), ()))
    loss_BT, metrics = jax.jit(task.loss)(params, (), batch)
    nll_BT, _ = jax.jit(task.token_losses)(params, (), batch)
    added = 2.0 * config.model.num_layers
    np.testing.assert_allclose(loss_BT, nll_BT + added, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll_BT, rtol=1e-5)
    np.testing.assert_array_equal(metrics["balance"], np.full((2, T), added))


def test_a_pipeline_refuses_what_it_does_not_carry(balanced):
    flags = [f"--config.{k}={v}" for k, v in (SMALL | {"mesh.pipe": 2, "mesh.data": 4}).items()]
    config = called.read(CONFIGS["encoder"], *flags)
    config = loop.resolve(config, make_dataset(config.data, "train"))
    program = steps.build(config, 16)
    batch = program.put(next(iter(make_dataset(config.data, "train"))))
    with pytest.raises(ValueError, match="collection 'losses' beside its parameters, which a pipe"):
        jax.eval_shape(program.train_step, program.abstract_state, batch)
    config.model.norm = "prepbn(steps=3)"
    with pytest.raises(ValueError, match="batch_stats beside its parameters.*set mesh.pipe to 1"):
        steps.build(config, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 4}, "model.num_classes is 4, but the dataset's is 10; leave it out"),
        ({"model.grid": (5, 5)}, r"model.grid is \(5, 5\), but the dataset's is \(4, 4\)"),
        ({"model.architecture": "denoiser", "train.z_loss": 0.1}, "only language models have one"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(changes, message):
    flags = [f"--config.{name}={value}" for name, value in (SMALL | changes).items()]
    config = called.read(CONFIGS["encoder"], *flags)
    with pytest.raises(ValueError, match=message):
        tasks.of_config(loop.resolve(config, make_dataset(config.data, "train")), 16)


def test_classes_that_the_model_lacks():
    config = called.read(CONFIGS["encoder"], *(f"--config.{k}={v}" for k, v in SMALL.items()))
    dataset = make_dataset(config.data, "train")
    model = tasks.of_config(loop.resolve(config, dataset), 16).model
    batch = next(iter(dataset))
    tasks.check_batch(model, batch)
    with pytest.raises(ValueError, match=r"label 1\d is no class of the model, which has 10"):
        tasks.check_batch(model, batch | {"labels": batch["labels"] + 10})
