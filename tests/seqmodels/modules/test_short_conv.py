"""ShortConv: what is computed with the convolution equals what is computed after it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.modules import norms
from seqmodels.modules.short_conv import ShortConv


def _run(x_BTD, **options):
    conv = ShortConv(use_bias=True, **options)
    return conv.init_with_output(jax.random.key(0), x_BTD)


@pytest.mark.parametrize("activation", [None, nn.silu, nn.gelu], ids=["none", "silu", "gelu"])
def test_activation_and_norm(activation):
    x_BTD = jax.random.normal(jax.random.key(1), (2, 9, 6))
    (z_BTD, tail), params = _run(x_BTD, activation=None)
    expected = z_BTD if activation is None else activation(z_BTD)
    (y_BTD, _), others = _run(x_BTD, activation=activation)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-6)
    assert jax.tree.structure(params) == jax.tree.structure(others)
    np.testing.assert_array_equal(tail, x_BTD[:, -3:])
    if activation is nn.gelu:
        with pytest.raises(ValueError, match="l2_norm_heads goes with activation=nn.silu or None"):
            _run(x_BTD, activation=activation, l2_norm_heads=2)
        return
    (y_BTD, _), _ = _run(x_BTD, activation=activation, l2_norm_heads=2)
    unit = norms.l2_norm(expected.reshape(2, 9, 2, 3)).reshape(2, 9, 6)
    np.testing.assert_allclose(y_BTD, unit, atol=1e-6)
    assert y_BTD.dtype == jnp.float32
