"""Training steps compiled for a slice of four TPU chips that is not here: kernels run on each
chip's part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from ml_collections import ConfigDict

from configs import common
from experiments.training import steps
from kernels_pallas.tools import tpu_compile
from seqmodels import sharding

ROWS, TIME = 8, 512
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def test_a_mesh_over_several_slices():
    """The axes whose devices talk least span them. GPUs of several hosts look the same to JAX."""
    tpu_compile.devices("v6e:2x2")  # prepares the environment
    two = topologies.get_topology_desc("v6e:2x2", platform="tpu", num_slices=2).devices

    def slices(devices=two, **sizes):
        mesh = sharding.make_mesh(sizes, devices)
        assert len(set(mesh.devices.flat)) == mesh.size == len(devices)
        return np.vectorize(lambda d: d.slice_index)(mesh.devices).squeeze().tolist()

    assert slices(data=2, fsdp=4) == slices(fsdp=2, seq=4) == [[0] * 4, [1] * 4]
    assert slices(pipe=4, data=2) == [[0, 1]] * 4
    assert slices(fsdp=8) == [0] * 4 + [1] * 4
    assert slices(two[4:], fsdp=2, tensor=2) == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"different numbers of devices \(0: 4, 1: 2\)"):
        slices(two[:6], data=6)


def compiled(mesh, **parallel):
    config = common.get_config()
    config.data.batch_size = ROWS
    config.model.update(
        {
            "pattern": "gla(num_heads=2, implementation='pallas_tpu')",
            "num_layers": 2,
            "d_model": 256,
            "d_ff": 256,
            "vocab_size": 512,
            "dtype": "bfloat16",
        }
    )
    config.mesh = ConfigDict(mesh)
    config.parallel.update(parallel)
    program = steps.build(config, TIME, tpu_compile.devices("v6e:2x2"))
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32)
        for name in ("inputs", "labels", "segment_ids", "loss_mask")
    }
    traced = program.train_step.trace(program.abstract_state, batch)
    executable = traced.lower(lowering_platforms=("tpu",)).compile()
    hlo = executable.as_text()
    return executable, hlo, re.findall(rf" = (\S+) ({COLLECTIVES})(?:-start)?\(", hlo)


@pytest.mark.exhaustive
@pytest.mark.parametrize("axis", ["data", "seq", "tensor"])
def test_kernels_run_on_parts(axis):
    """Forward and backward kernel in the scan over layers; along time, one collective a way and
    nothing of the sequence's length."""
    _, hlo, collectives = compiled({axis: 4} if axis != "tensor" else {"tensor": 2, "data": 2})
    assert hlo.count("tpu_custom_call") >= 2
    if axis == "seq":
        gathers = [shape for shape, kind in collectives if kind == "all-gather"]
        assert len(gathers) == 2, collectives


@pytest.mark.exhaustive
def test_an_offloaded_optimizer_takes_no_memory_of_the_chip():
    executable, _, _ = compiled({"data": 4})
    offloaded, _, _ = compiled({"data": 4}, offload=True)
    before, after = executable.memory_analysis(), offloaded.memory_analysis()
    on_host = after.host_argument_size_in_bytes
    assert on_host > 0
    assert before.argument_size_in_bytes - after.argument_size_in_bytes >= 0.9 * on_host
