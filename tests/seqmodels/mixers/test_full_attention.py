"""Softmax attention over whole documents: against its formula, with rotations on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers
from seqmodels.modules import grids


def test_it_is_softmax_over_all_pairs_of_a_document():
    """In float64: identity projections, so that q = k = v = x, in two documents of a 2 x 3 grid."""
    with jax.enable_x64(True):
        x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 8)))
        ids_BT = jnp.repeat(jnp.asarray([[1, 2], [5, 3]]), 6, axis=1)
        for rope_base in (None, 10.0):
            mixer = mixers.make(
                "full_attention", d_model=8, num_heads=2, grid=(2, 3), rope_base=rope_base,
                dtype=jnp.float64, param_dtype=jnp.float64, implementation="reference",
            )  # fmt: skip
            params = {name: {"kernel": jnp.eye(8)} for name in "qkvo"}
            y_BTD, _ = jax.jit(mixer.apply)({"params": params}, x_BTD, ids_BT)
            x_BTHK = turned = np.asarray(x_BTD).reshape(4, 6, 2, 4)
            if rope_base:
                place = jnp.broadcast_to(jnp.asarray([divmod(i, 3) for i in range(6)]), (4, 6, 2))
                turned = np.asarray(grids.rope_nd(jnp.asarray(x_BTHK), place, rope_base))
            logits = np.einsum("bthk,bshk->bhts", turned, turned) / 2
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            expected = np.einsum("bhts,bshk->bthk", weights, x_BTHK).reshape(2, 12, 8)
            np.testing.assert_allclose(y_BTD, expected, atol=1e-6 if rope_base else 1e-12)


def test_heads_that_do_not_fit_are_refused():
    mixer = mixers.make("full_attention", d_model=8, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="num_kv_heads 3 must divide num_heads 4"):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 4, 8)))
