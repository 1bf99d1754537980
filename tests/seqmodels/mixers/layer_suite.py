"""Checks of layers under a scan, which `test_mixers.py` runs over the registry, and on a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import mixers, sharding
from tests.seqmodels.mixers.mixer_suite import (
    ERROR_FLOAT32,
    LAYERS,
    Case,
    D,
    assert_close,
    document_length,
    initial_params,
    normal,
    random_params,
)


def check_layers(case: Case):
    """Checks that a traced layer index, as under nn.scan over layers, gives what an int gives."""
    mixer = case.make()
    params = [random_params(case, seed) for seed in range(LAYERS)]
    layers = [case.layer(index) for index in range(LAYERS)]
    bounds = [layer.lower_bound_D for layer in layers]
    x_BTD = normal(2, document_length(case) or 4, D)

    def scan(params, x_BTD):
        def one_layer(mixer, x_BTD, inputs):
            index, bound_D = inputs
            y_BTD, state = mixer(x_BTD, layer=mixers.Layer(index, LAYERS, bound_D))
            return x_BTD + y_BTD, state

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x_BTD, inputs):
                scanned = nn.scan(
                    one_layer, variable_axes={"params": 0}, split_rngs={"params": True}
                )
                return scanned(case.make(name="mixer"), x_BTD, inputs)

        stacked, bound_LD = (jax.tree.map(lambda *p: jnp.stack(p), *z) for z in (params, bounds))
        inputs = jnp.arange(LAYERS), bound_LD
        return Stack().apply({"params": {"mixer": stacked}}, x_BTD, inputs)

    def loop(params, x_BTD):
        states = []
        for layer_params, layer in zip(params, layers):
            y_BTD, state = mixer.apply({"params": layer_params}, x_BTD, layer=layer)
            states.append(state)
            x_BTD = x_BTD + y_BTD
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    if not reads_layer(case):
        jax.eval_shape(scan, params, x_BTD)  # the values cannot differ
        return
    scanned, looped = jax.jit(lambda *z: (scan(*z), loop(*z)))(params, x_BTD)
    assert_close(scanned, looped, ERROR_FLOAT32, "layers")


def reads_layer(case: Case) -> bool:
    """Returns whether a mixer's traced program uses the layer's index or its lower bound."""
    mixer, params = case.make(), {"params": initial_params(case)}

    def apply(index, bound_D):
        x_BTD = jnp.zeros((1, document_length(case) or 2, D))
        return mixer.apply(params, x_BTD, layer=mixers.Layer(index, LAYERS, bound_D))

    jaxpr = jax.make_jaxpr(apply)(1, case.layer().lower_bound_D).jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    return any(id(v) in used for v in jaxpr.invars)


def check_on_a_mesh(apply, params, x_BTD, segment_ids_BT):
    """Checks that rows, time and heads split over eight devices give what one device gives.

    apply: (params, x_BTD, segment_ids_BT) -> y_BTD. Gradients of params and x are compared, too.
    """

    def results(params, x_BTD, segment_ids_BT):
        def loss(params, x_BTD):
            y_BTD = apply(params, x_BTD, segment_ids_BT)
            return jnp.sum(jnp.sin(y_BTD)), y_BTD

        return jax.grad(loss, (0, 1), has_aux=True)(params, x_BTD)

    expected = jax.jit(results)(params, x_BTD, segment_ids_BT)
    mesh = sharding.make_mesh({"data": 2, "seq": 2, "tensor": 2})

    def scoped(*arguments):
        with sharding.scope(mesh):
            return results(*arguments)

    replicated, split = (NamedSharding(mesh, s) for s in (PartitionSpec(), sharding.BATCH_SPEC))
    found = jax.jit(scoped, in_shardings=(replicated, split, split), out_shardings=replicated)(
        params, x_BTD, segment_ids_BT
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
