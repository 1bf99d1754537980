"""Eight simulated devices: parameters land where the rules say; numbers are in the errors."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kernels_pallas
from seqmodels import language_model, operators, sharding
from tests.seqmodels.mixers import mixer_suite as suite

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
    assert q_placement.spec == PartitionSpec("pipe", "fsdp", "tensor")
    placed = jax.device_put(variables, placement)
    tokens_BT = jax.device_put(tokens_BT, sharding.batch_sharding(mesh))
    np.testing.assert_allclose(jax.jit(model.apply)(placed, tokens_BT)[0], expected_BTW, atol=2e-5)
    kernel = placed["params"]["blocks"]["block_0"]["mixer"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4


def test_words_are_split_in_the_embedding_and_the_loss():
    rng = np.random.default_rng(0)
    table_WD = jnp.asarray(0.3 * rng.standard_normal((24, 8)), jnp.float32)
    tokens_BT, labels_BT = jnp.asarray(rng.integers(0, 24, (2, 4, 6)), jnp.int32)

    def value(embed, cross_entropy, table_WD, tokens_BT, labels_BT):
        x_BTD = 3.0 * embed(table_WD, tokens_BT)
        losses_BT, found = cross_entropy(x_BTD, table_WD, labels_BT, z_loss=0.1)
        return jnp.sum(losses_BT**2), (losses_BT, found)

    def plain(*arguments):
        def cross_entropy(*arrays, **keywords):
            return kernels_pallas.linear_cross_entropy(*arrays, details=True, **keywords)

        def embed(table_WD, tokens_BT):
            return jnp.take(table_WD, tokens_BT, axis=0)

        return jax.grad(lambda *z: value(embed, cross_entropy, *z), has_aux=True)(*arguments)

    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "seq": 2})

    def split(*arguments):
        with sharding.scope(mesh):
            both = operators.embedding, operators.linear_cross_entropy
            return jax.grad(lambda *z: value(*both, *z), has_aux=True)(*arguments)

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    tokens = place(*sharding.BATCH_SPEC)
    split = jax.jit(split, in_shardings=(place("tensor"), tokens, tokens), out_shardings=place())
    arguments = table_WD, tokens_BT, labels_BT
    expected = jax.jit(plain)(*arguments)
    suite.assert_close(split(*arguments), expected, 2e-5, "")
    logits = re.findall(r"f32\[[\d,]*24[\d,]*\]", split.lower(*arguments).compile().as_text())
    assert not [shape for shape in logits if shape.count(",") == 2]


@pytest.mark.parametrize(
    ("zero", "halved"),
    [(0, ""), (1, "opt"), (2, "opt grads"), (3, "opt grads params")],
)
def test_zero_splits_what_copies_would_hold(zero, halved):
    boxed = abstract(language_model.from_config(MODEL))["params"]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "seq": 2})
    placement = sharding.Placement(mesh, sharding.Options(zero=zero), boxed)
    opt = placement.optimizer(jax.eval_shape(optax.scale_by_adam().init, boxed))
    for name, tree in (("opt", opt.mu), ("grads", placement.grads), ("params", placement.params)):
        shard = tree["embed"]["embedding"].shard_shape((56, 32))
        assert shard == (56, 4 if name in halved.split() else 16), name


def test_an_offloaded_optimizer_lies_on_the_host():
    boxed = abstract(language_model.from_config(MODEL))["params"]
    mesh = sharding.make_mesh({"data": 8})
    placement = sharding.Placement(mesh, sharding.Options(offload=True), boxed)
    opt = placement.optimizer(jax.eval_shape(optax.scale_by_adam().init, boxed))
    assert {leaf.memory_kind for leaf in jax.tree.leaves(opt)} == {"pinned_host"}
    assert "pinned_host" not in {leaf.memory_kind for leaf in jax.tree.leaves(placement.params)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not fit 8 devices.*multiply to 3"),
        ({"data": 16}, "does not fit 8 devices.*multiply to 16"),
        ({"data": 2, "seq": 2, "tensor": 3}, "does not fit 8 devices.*multiply to 12"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"rows": 2}, "no axis 'rows'; its axes are pipe, data, fsdp, seq, tensor"),
        ({"data": 0}, "positive"),
    ],
)
def test_a_mesh_that_cannot_be_says_why(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collective": "broadcast"}, "choose one of all_gather, all_scan, ring"),
        ({"zero": 4}, "parallel.zero is 4; expected 0"),
        ({"microbatches": -1}, "microbatches is -1"),
        (
            {"collectives": "ring"},
            "parallel has no field 'collectives'; it has collective, zero, offload",
        ),
    ],
)
def test_options_that_are_unknown(options, message):
    with pytest.raises(ValueError, match=message):
        sharding.Options.from_config(options)


def test_what_does_not_divide_is_named_with_its_numbers():
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match="batch_size 12 is not divisible by 8"):
        sharding.check_batch(mesh, 12, 64)
    model = language_model.from_config(MODEL | {"d_model": 36})
    with pytest.raises(ValueError, match=r"kernel.*36 is not divisible by 8 \(fsdp=8"):
        sharding.shardings(mesh, abstract(model))
    mesh = sharding.make_mesh({"seq": 8})
    with pytest.raises(ValueError, match=r"seq_len 4 is not divisible by 8 \(seq=8 in the mesh\)"):
        sharding.check_batch(mesh, 12, 4)


def test_stages_and_heads_that_do_not_divide():
    mesh = sharding.make_mesh({"pipe": 4, "tensor": 2})
    with pytest.raises(
        ValueError, match="6 rows are not divisible by parallel.microbatches, which is 4"
    ):
        sharding.check_batch(mesh, 6, 64)
    sharding.check_batch(mesh, 6, 64, sharding.Options(microbatches=3))
    with pytest.raises(ValueError, match=r"2 is not divisible by 4 \(pipe=4 in the mesh\)"):
        sharding.shardings(mesh, abstract(language_model.from_config(MODEL)))
    model = language_model.from_config(MODEL | {"num_layers": 1})
    with (
        sharding.scope(mesh),
        pytest.raises(ValueError, match="'pipe' splits the repeats.*scans over none"),
    ):
        abstract(model)
    model = language_model.from_config(MODEL | {"pattern": "gla(num_heads=3)", "d_model": 48})
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})

    def apply(params, tokens_BT):
        with sharding.scope(mesh):
            return model.apply(params, tokens_BT)[0]

    with pytest.raises(ValueError, match="3 heads cannot be split over mesh axis 'tensor'.*by 2"):
        jax.eval_shape(apply, nn.meta.unbox(abstract(model)), jnp.zeros((8, 12), jnp.int32))
