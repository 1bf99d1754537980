"""Functions over whole documents on a mesh that splits rows, time and heads: as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kernels_pallas
from seqmodels import operators, sharding
from tests.seqmodels.mixers import mixer_suite as suite

B, T, H, K, V = 2, 24, 2, 4, 3
IDS_BT = np.repeat([[1, 2, 1, 0], [3, 3, 3, 3]], [7, 1, 10, 6], axis=1).astype(np.int32)


def _arrays():
    rng = np.random.default_rng(0)
    shapes = (B, T, 1, K), (B, T, 1, K), (B, T, H, V), (B, H, K, V)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _totals(x_BTHV, ids_BT, block_size=None):
    """The sums by their definition, token by token."""
    totals = np.zeros_like(x_BTHV)
    for b, t in np.ndindex(x_BTHV.shape[:2]):
        run = np.cumsum(np.diff(ids_BT[b], prepend=ids_BT[b, 0]) != 0)
        position = np.arange(T) - np.searchsorted(run, run, side="left")
        block = position // (block_size or T)
        totals[b, t] = x_BTHV[b, (run == run[t]) & (block <= block[t])].sum(axis=0)
    return totals


@pytest.mark.parametrize(
    "packed, block_size",
    [(False, None), pytest.param(True, None, marks=pytest.mark.slow), (True, 5)],
)
def test_documents_on_a_mesh(packed, block_size):
    """Sums, final states, totals and gradients, of grouped heads, over seq, data and tensor."""
    arrays, ids = _arrays(), IDS_BT if packed else None

    def value(plain, q, k, v, state, ids):
        keywords = {"segment_ids": ids, "block_size": block_size}
        function = kernels_pallas.document_sums if plain else operators.document_sums
        o, final = function(q, k, v, initial_state=state, **keywords)
        totals = operators.document_totals(v, ids, block_size=block_size)
        number = sum(jnp.sum(jnp.sin(x)) for x in (o, final, totals))
        return number, (o, final, totals)

    def run(plain, q, k, v, state, ids):
        gradient = jax.grad(value, argnums=(1, 2, 3, 4), has_aux=True)
        return gradient(plain, q, k, v, state, ids)

    mesh = sharding.make_mesh({"data": 2, "seq": 2, "tensor": 2})

    def split(*arguments):
        with sharding.scope(mesh):
            return run(False, *arguments)

    replicated = NamedSharding(mesh, PartitionSpec())
    got = jax.jit(split, out_shardings=replicated)(*arrays, ids)
    expected = jax.jit(lambda *arguments: run(True, *arguments))(*arrays, ids)
    suite.assert_close(got, expected, 2e-5, "")
    all_one = np.zeros((B, T), np.int32) if ids is None else ids
    np.testing.assert_allclose(got[1][2], _totals(arrays[2], all_one, block_size), atol=1e-5)


def test_a_count_is_each_documents_own():
    """Totals of ones are the number of tokens of each token's document, in float32."""
    ones_BT11 = jnp.ones((B, T, 1, 1), jnp.bfloat16)
    counts = jax.jit(operators.document_totals)(ones_BT11, IDS_BT)
    assert counts.dtype == jnp.float32
    lengths = [[7] * 7 + [1] + [10] * 10 + [6] * 6, [24] * 24]
    np.testing.assert_array_equal(counts[:, :, 0, 0], lengths)
