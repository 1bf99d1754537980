"""Sums and scalings as products: as the plain ones, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import matmul


@pytest.mark.parametrize("scale_shape", [(2, 3, 5, 1), (2, 1, 5, 1), (2, 3, 1, 1), (2, 3, 5, 7)])
def test_scaled(scale_shape):
    rng = np.random.default_rng(0)
    x, scale, weights = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 5, 7), scale_shape, (2, 3, 5, 7))
    )

    def of(multiply):
        return jax.jit(jax.value_and_grad(lambda x, s: jnp.sum(multiply(x, s) * weights), (0, 1)))(
            x, scale
        )

    jax.tree.map(
        lambda got, plain: np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5),
        of(matmul.scaled),
        of(jnp.multiply),
    )


def test_sum_last():
    x = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    np.testing.assert_allclose(matmul.sum_last(x), x.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)
    gradient = jax.jacrev(lambda x: matmul.sum_last(x)[1, 2, 0])(x)
    np.testing.assert_array_equal(gradient[1, 2], np.ones(7))
    assert np.count_nonzero(gradient) == 7
