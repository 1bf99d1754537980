"""The same training run on meshes of eight simulated devices: curves of loss and gradient norm lie
on one another."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from experiments.training import steps

ROWS, TIME, WORDS = 8, 32, 48
# Three mixers a period, four periods: one for each stage of a pipeline. None of them norms what it
# reads from its state: that may be tiny, at a document's start, and a norm's gradient then turns
# rounding into more.
MODEL = {
    "pattern": "rg_lru(num_heads=2) + linear_attention(num_heads=2) + "
    "attention(num_heads=2, num_kv_heads=1, window=9)",
    "num_layers": 12,
    "d_model": 16,
    "d_ff": 32,
    "vocab_size": WORDS,
    "remat": "full",
}


def config(mesh, accumulate=1, **parallel):
    config = common.get_config()
    config.data.batch_size = ROWS
    config.model.update(MODEL)
    config.mesh = ConfigDict(mesh)
    config.parallel.update(parallel)
    config.train.update({"accumulate": accumulate, "z_loss": 1e-3})
    config.schedule.warmup_steps = 1
    # Adam's first step is the gradient's sign where eps is small, and rounding decides the sign of
    # a gradient of nothing.
    config.optimizer.update({"learning_rate": 1e-3, "eps": 1e-3})
    return config


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, WORDS, (ROWS, TIME + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": np.sort(rng.integers(1, 4, (ROWS, TIME)), axis=1).astype(np.int32),
        "loss_mask": (rng.random((ROWS, TIME)) < 0.8).astype(np.float32),
    }


def curve(config, devices=None, count=3):
    """(loss, gradient norm, parameter norm) of each step."""
    program = steps.build(config, TIME, devices)
    state, on_devices = program.init(0), program.put(batch())
    rows = []
    for _ in range(count):
        state, metrics = program.train_step(state, on_devices)
        rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")])
    return np.array(rows)


@functools.cache
def expected():
    return curve(config({"data": 1}), jax.devices()[:1])


def check(mesh, **keywords):
    np.testing.assert_allclose(curve(config(mesh, **keywords)), expected(), rtol=1e-5)


@pytest.mark.slow
def test_a_product_of_axes():
    check({"fsdp": 2, "tensor": 2, "seq": 2})


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"fsdp": 8}, {"seq": 8}, {"data": 2, "seq": 4}, {"pipe": 4, "data": 2}],
    ids=lambda mesh: ",".join(f"{axis}={size}" for axis, size in mesh.items()),
)
def test_meshes(mesh):
    check(mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "keywords"),
    [
        ({"pipe": 2, "data": 2, "seq": 2}, {"split_backward": True, "microbatches": 4}),
        (
            {"data": 4, "seq": 2},
            {"zero": 2, "offload": True, "accumulate": 2, "collective": "ring"},
        ),
    ],
    ids=["split_backward", "zero_offload"],
)
def test_options(mesh, keywords):
    check(mesh, **keywords)
