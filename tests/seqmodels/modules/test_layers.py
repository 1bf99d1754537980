"""Dense layers and gates: gradients are JAX's own, and the backward pass keeps what is said."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.modules import layers


def _normal(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(shape)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def _assert_same(got, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        ),
        got,
        expected,
    )


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (2, 5, 2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_has_the_gradients_of_flax(shape, dtype):
    x, weights = _normal(*shape, dtype=dtype), _normal(*shape[:-1], 4)
    ours = layers.dense(4, "dense", axes=(None, None), dtype=dtype)
    plain = nn.Dense(4, dtype=dtype)
    params = nn.unbox(plain.init(jax.random.key(0), x))

    def gradients(module):
        return jax.jit(
            jax.grad(lambda params, x: jnp.sum(module.apply(params, x) * weights), (0, 1))
        )(params, x)

    _assert_same(gradients(ours), gradients(plain), 1e-5 if dtype == jnp.float32 else 2e-2)


def test_a_gate_keeps_its_two_arguments():
    x, gate = _normal(2, 3), _normal(3, 2).T

    def residuals(function):
        values, vjp = jax.vjp(function, x, gate)
        return values, vjp(jnp.ones_like(x)), len(jax.tree.leaves(vjp))

    plain = residuals(lambda x, gate: x * nn.silu(gate))
    ours = residuals(lambda x, gate: layers.gated(x, gate, nn.silu))
    _assert_same(ours[:2], plain[:2], 1e-6)
    assert ours[2] == 2 < plain[2]
