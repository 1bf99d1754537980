"""The pipeline and its backward pass in two against layers in a row: values, all gradients, and
what the program sends."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import pipeline, sharding
from seqmodels.modules import norms

LAYERS, B, T, D = 4, 8, 6, 8


class Residual(nn.Module):
    """Two dense layers, one with a bias, and a norm, whose parameters are no dense layer's."""

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, bound_D):
        h_BTF = nn.Dense(12, use_bias=False, name="up")(norms.RMSNorm(name="norm")(x_BTD))
        h_BTF = jnp.tanh(h_BTF) * segment_ids_BT[..., None]
        return x_BTD + bound_D[None, None] * nn.Dense(D, name="down")(h_BTF)


def call(apply, index, x_BTD, segment_ids_BT, bound_LD):
    return apply(x_BTD, segment_ids_BT, bound_LD[index])


def in_a_row(layer, params_L, index_L, x_BTD, rows, shared):
    for i in range(LAYERS):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], params_L)
        x_BTD = layer(params, index_L[i], x_BTD, rows, shared)
    return x_BTD


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x_BTD, cotangent_BTD = jnp.asarray(rng.standard_normal((2, B, T, D)), jnp.float32)
    ids_BT = jnp.asarray(rng.integers(1, 4, (B, T)), jnp.int32)
    bound_LD = jnp.asarray(rng.random((LAYERS, D)), jnp.float32)
    layer = pipeline.Layer(Residual(), call)
    init = jax.vmap(lambda key: layer.module.init(key, x_BTD, ids_BT, bound_LD[0])["params"])
    params_L = nn.meta.unbox(init(jax.random.split(jax.random.key(0), LAYERS)))
    arrays = params_L, x_BTD, bound_LD, ids_BT, cotangent_BTD

    def program(run):
        def value(params_L, x_BTD, bound_LD, ids_BT, cotangent_BTD):
            y_BTD = run(layer, params_L, jnp.arange(LAYERS), x_BTD, ids_BT, bound_LD)
            return jnp.sum(y_BTD * cotangent_BTD), y_BTD

        return jax.grad(value, (0, 1, 2), has_aux=True)

    return program, arrays, jax.jit(program(in_a_row))(*arrays)


@pytest.mark.parametrize("split_backward", [False, True])
def test_equals_layers_in_a_row(problem, split_backward):
    program, arrays, expected = problem
    mesh = sharding.make_mesh({"pipe": 2, "data": 2, "seq": 2})
    options = sharding.Options(microbatches=4, split_backward=split_backward)

    def scoped(*arrays):
        with sharding.scope(mesh, options):
            return program(pipeline.run)(*arrays)

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    stages, tokens = place("pipe"), place(*sharding.BATCH_SPEC)
    shardings = stages, tokens, place(), tokens, tokens
    compiled = (
        jax.jit(scoped, in_shardings=shardings, out_shardings=((stages, tokens, place()), tokens))
        .lower(*arrays)
        .compile()
    )
    actual = compiled(*(jax.device_put(*pair) for pair in zip(arrays, shardings)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected
    )
    # Stages hand on to their neighbours; nobody gathers activations of all stages.
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", compiled.as_text())
    assert "collective-permute" in compiled.as_text()
    assert not [shape for shape in gathered if len(shape.split(",")) > 3], gathered
