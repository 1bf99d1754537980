"""Every mixer with time split over four devices and rows over two gives what it gives on one: outputs, states and gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import sharding
from tests.seqmodels import mixer_suite as suite

MESH = {"data": 2, "seq": 4}


def program(cases, mesh=None, options=None):
    """(params of each case, x_BTD, segment_ids_BT, cotangent_BTD) -> for each case y, state, gradients of params and x."""

    def one(case, params, x_BTD, segment_ids_BT, cotangent_BTD):
        def loss(params, x_BTD):
            apply = functools.partial(case.make().apply, {"params": params}, layer=case.layer())
            y_BTD, state = apply(x_BTD, segment_ids_BT)
            return jnp.sum(y_BTD * cotangent_BTD), (y_BTD, state)

        gradients, results = jax.grad(loss, (0, 1), has_aux=True)(params, x_BTD)
        return results, gradients

    def everything(params, *arrays):
        found = {str(case): one(case, params[str(case)], *arrays) for case in cases}
        return found

    if mesh is None:
        return jax.jit(everything)

    def scoped(*arguments):
        with sharding.scope(mesh, options):
            return everything(*arguments)

    replicated, split = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), sharding.BATCH_SPEC)
    )
    return jax.jit(scoped, in_shardings=(replicated, split, split, split), out_shardings=replicated)


def check(cases, mesh_sizes=MESH, **options):
    """Both programs agree."""
    B, T, D = suite.B, suite.T, suite.D
    params = {str(case): suite.random_params(case) for case in cases}
    arguments = (
        params, suite.normal(B, T, D, seed=1), suite.segment_ids(), suite.normal(B, T, D, seed=2)
    )  # fmt: skip
    expected = program(cases)(*arguments)
    mesh = sharding.make_mesh(mesh_sizes)
    actual = program(cases, mesh, sharding.Options(**options))(*arguments)
    for case in cases:
        suite.assert_close(actual[str(case)], expected[str(case)], suite.ERROR_FLOAT32, f"{case}: ")
