"""Every mixer with time split over four devices and rows over two gives what it gives on one:
outputs, states and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import sharding
from tests.seqmodels.mixers import mixer_suite as suite

MESH = {"data": 2, "seq": 4}


def program(cases, mesh=None, options=None, dtype=jnp.float32):
    """(params of each case, x_BTD, segment_ids_BT, cotangent_BTD) -> for each case y, state,
    gradients of params and x."""

    def one(case, params, x_BTD, segment_ids_BT, cotangent_BTD):
        def loss(params, x_BTD):
            mixer = case.make(dtype=dtype, param_dtype=dtype)
            apply = functools.partial(mixer.apply, {"params": params}, layer=case.layer())
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


def check(cases, limit=2e-5, exact=False, **options):
    """Both programs agree; exact: with the one device's in float64. A sum that cancels, as the
    gradient of a key's bias does, is measured against all gradients."""
    B, T, D = suite.B, suite.T, suite.D
    params = {str(case): suite.random_params(case) for case in cases}
    arguments = (
        params, suite.normal(B, T, D, seed=1), suite.segment_ids(cases[0]), suite.normal(B, T, D, seed=2)
    )  # fmt: skip
    if exact:
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), arguments
            )
            expected = program(cases, dtype=jnp.float64)(*wide)
    else:
        expected = program(cases)(*arguments)
    actual = program(cases, sharding.make_mesh(MESH), sharding.Options(**options))(*arguments)
    for case in cases:
        results, gradients = expected[str(case)]
        suite.assert_close(actual[str(case)][0], results, limit, f"{case}: ")
        leaves = jax.tree.leaves(gradients)
        rms = np.sqrt(sum(np.sum(np.square(x)) for x in leaves) / sum(x.size for x in leaves))
        paths = jax.tree_util.tree_leaves_with_path(gradients)
        for (path, b), a in zip(paths, jax.tree.leaves(actual[str(case)][1]), strict=True):
            scale = max(np.sqrt(np.mean(np.square(b))), 0.1 * rms)
            found = np.max(np.abs(a - b)) / scale
            assert found < limit, f"{case}: gradient of {jax.tree_util.keystr(path)}: {found:.1e}"


@pytest.mark.slow
def test_a_mixer_of_each_kind():
    """Two recurrences, a scan over gates, blocks, a window."""
    kinds = ("attention", 1), ("mamba", 0), ("mlstm", 0), ("rg_lru", 0), ("transnormer_local", 1)
    check([suite.Case(*kind) for kind in kinds])


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", suite.first_cases(), ids=str)
def test_every_mixer(case):
    check([case])


@pytest.mark.exhaustive
@pytest.mark.parametrize("collective", ["all_scan", "ring"])
@pytest.mark.parametrize("name", ["attention", "gated_delta_net", "gla", "mamba", "rg_lru"])
def test_other_collectives(name, collective):
    check([suite.Case(name)], collective=collective)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in suite.all_cases() if case.variant], ids=str)
def test_every_variant(case):
    """Eigenvalues down to -1 keep what was written, and its rounding, for longer: two float32
    programs may be twice as far from each other as each is from the truth."""
    check([case], limit=suite.ERROR_FLOAT32, exact=True)
