import numpy as np
import pytest

from seqmodels.modules import positions


def test_scaled_frequencies():
    """Wavelengths beyond T / low are `factor` times longer, those below T / high stay as they are.

    The rest lies between.
    """
    frequency_K, _ = positions.frequencies(12, 100.0)
    scaled_K, _ = positions.frequencies(12, 100.0, ("llama3", 8.0, 1.0, 4.0, 40))
    ratio_K = np.asarray(scaled_K / frequency_K)
    turns_K = 40 / (2 * np.pi) * np.asarray(frequency_K)
    np.testing.assert_allclose(ratio_K[turns_K >= 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio_K[turns_K <= 1], 1 / 8, rtol=1e-6)
    between = (turns_K > 1) & (turns_K < 4)
    assert between.any() and np.all((ratio_K[between] > 1 / 8) & (ratio_K[between] < 1))
    linear_K, _ = positions.frequencies(12, 100.0, ("linear", 2.0))
    np.testing.assert_allclose(linear_K, 0.5 * frequency_K)


def test_a_dynamic_base_is_each_tokens_own():
    """Pieces are turned as the whole is, and as without a scaling up to the trained length."""
    position_BT = np.arange(12)[None]
    dynamic = ("dynamic", 2.0, 6)
    plain_11K, _ = positions.frequencies(8, 1e4)
    whole_BTK, _ = positions.frequencies(8, 1e4, dynamic, position_BT)
    np.testing.assert_array_equal(whole_BTK[:, :6], np.broadcast_to(plain_11K, (1, 6, 4)))
    assert np.all(np.diff(np.asarray(whole_BTK[0, 5:, 1:]), axis=0) < 0)
    piece_BTK, _ = positions.frequencies(8, 1e4, dynamic, position_BT[:, 9:])
    np.testing.assert_array_equal(piece_BTK, whole_BTK[:, 9:])


@pytest.mark.parametrize(
    "scaling", [("yarn", 8.0), ("llama3", 8.0), ("linear", 2.0, 1.0), ("ntk",)]
)
def test_unknown_scalings(scaling):
    with pytest.raises(ValueError, match="rope_scaling is .* it must be"):
        positions.frequencies(8, 1e4, scaling)
