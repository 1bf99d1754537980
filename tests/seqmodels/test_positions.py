import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import positions


def test_scaled_frequencies():
    """Wavelengths beyond T / low are `factor` times longer, those below T / high stay, and the rest lies between."""
    wavelength_K = jnp.array([2.0, 10.0, 20.0, 30.0, 60.0, 200.0])
    scaled_K = positions.scale_frequencies(1 / wavelength_K, ("llama3", 8.0, 1.0, 4.0, 400))
    ratio_K = np.asarray(scaled_K * wavelength_K) * 1.0
    turns_K = 400 / (2 * np.pi * np.asarray(wavelength_K))
    np.testing.assert_allclose(ratio_K[turns_K >= 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio_K[turns_K <= 1], 1 / 8, rtol=1e-6)
    between = (turns_K > 1) & (turns_K < 4)
    assert np.all((ratio_K[between] > 1 / 8) & (ratio_K[between] < 1))
    linear_K = positions.scale_frequencies(1 / wavelength_K, ("linear", 2.0))
    np.testing.assert_allclose(linear_K, 0.5 / wavelength_K)


@pytest.mark.parametrize("scaling", [("yarn", 8.0), ("llama3", 8.0), ("linear", 2.0, 1.0)])
def test_unknown_scalings(scaling):
    with pytest.raises(ValueError, match="rope_scaling is .* it must be"):
        positions.scale_frequencies(jnp.ones(4), scaling)
