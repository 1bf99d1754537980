"""Eight simulated devices: parameters land where the rules say, and the numbers are in the errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from seqmodels import language_model, sharding

MODEL = {
    "vocab_size": 56,
    "d_model": 32,
    "num_layers": 2,
    "pattern": "gated_delta_net(num_heads=2)",
}


def abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((8, 12), jnp.int32))


def test_sharded_outputs_equal_single_device_ones():
    model = language_model.from_config(MODEL)
    tokens_BT = jax.random.randint(jax.random.key(0), (8, 12), 0, 56)
    variables = nn.meta.unbox(model.init(jax.random.key(1), tokens_BT))
    expected_BTW = jax.jit(model.apply)(variables, tokens_BT)[0]
    mesh = sharding.make_mesh({"data": -1, "fsdp": 4})
    placement = sharding.shardings(mesh, abstract(model))
    q_placement = placement["params"]["blocks"]["block_0"]["mixer"]["q"]["kernel"]
    assert q_placement.spec == PartitionSpec(None, "fsdp", "tensor")
    placed = jax.device_put(variables, placement)
    tokens_BT = jax.device_put(tokens_BT, sharding.batch_sharding(mesh))
    np.testing.assert_allclose(jax.jit(model.apply)(placed, tokens_BT)[0], expected_BTW, atol=2e-5)
    kernel = placed["params"]["blocks"]["block_0"]["mixer"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not fit 8 devices.*multiply to 3"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"rows": 2}, "no axis 'rows'; its axes are data, fsdp, seq, tensor"),
        ({"data": 0}, "positive"),
        ({"data": 4, "seq": 2}, "'seq' must have size 1"),
    ],
)
def test_a_mesh_that_cannot_be_says_why(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_what_does_not_divide_is_named_with_its_numbers():
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match="batch_size 12 is not divisible by 8"):
        sharding.check_batch(mesh, 12, 64)
    model = language_model.from_config(MODEL | {"d_model": 36})
    with pytest.raises(ValueError, match=r"kernel.*36 is not divisible by 8 \(fsdp=8"):
        sharding.shardings(mesh, abstract(model))
