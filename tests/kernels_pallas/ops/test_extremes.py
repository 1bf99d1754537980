"""Random arguments from the ends of what is legal, for every operator: chunked against the
recurrence in float64."""

import jax
import numpy as np
import pytest

from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    assert_close,
    everything,
    inputs_of,
    truth,
)
from tests.kernels_pallas.ops.test_delta_rule import DELTA_RULE, DIAGONAL_PLUS_LOW_RANK
from tests.kernels_pallas.ops.test_diagonal_scan import CASE as DIAGONAL_SCAN
from tests.kernels_pallas.ops.test_document_sums import CASE as DOCUMENT_SUMS
from tests.kernels_pallas.ops.test_linear_attention import CASE as LINEAR_ATTENTION

SHAPE = Shape(B=1, T=50, H=2, G=1, K=4, V=3)
LEAST = np.finfo(np.float32).min
LOG_DECAYS = (0.0, 0.0, -1e-38, -1e-6, -0.1, -88.0, -746.0, -1000.0, -1001.0, -1e20, LEAST, -np.inf)
DECAYS = (0.0, 1.0, 1.0, -1.0, 1.0 - 2.0**-24, 1e-38, 0.5, -0.999)
SIZES = (0.0, 1e-30, 1.0, 1.0, 1.0, 1e6)


def _pick(rng, values, shape):
    """Mostly runs of one value, which is where errors add up."""
    return np.where(rng.random(shape) < 0.8, rng.choice(values), rng.choice(values, shape))


def _extreme(rng, case, regime):
    inputs = inputs_of(case, SHAPE, regime)
    for name in ("log_decay", "decay"):
        if name in inputs:
            values = LOG_DECAYS if name == "log_decay" else DECAYS
            inputs[name] = _pick(rng, values, inputs[name].shape).astype(np.float32)
    for name in ("q", "v", "x", "initial_state"):
        if name in inputs:
            inputs[name] = inputs[name] * _pick(rng, SIZES, ()).astype(np.float32)
    if "beta" in inputs:
        beta = _pick(rng, (0.0, 1e-30, 1.0, 1.01, 2.0), inputs["beta"].shape)
        inputs["beta"] = beta.astype(np.float32)
        inputs["k"] = inputs["k"][:, rng.integers(0, rng.integers(1, SHAPE.T), SHAPE.T)]
    ids = np.cumsum(rng.random((1, SHAPE.T)) < rng.choice([0.0, 0.1, 0.9]), axis=1)
    return inputs, ids.astype(np.int32)


@pytest.mark.parametrize(
    "case, regime",
    [
        (LINEAR_ATTENTION, "per_channel weak"),
        (DELTA_RULE, "per_token weak"),
        (DIAGONAL_SCAN, "weak"),
        pytest.param(DOCUMENT_SUMS, "whole", marks=pytest.mark.slow),
        pytest.param(LINEAR_ATTENTION, "per_token weak", marks=pytest.mark.slow),
        pytest.param(DELTA_RULE, "per_channel weak", marks=pytest.mark.slow),
        pytest.param(DIAGONAL_PLUS_LOW_RANK, "per_channel weak", marks=pytest.mark.slow),
        pytest.param(DIAGONAL_SCAN, "log", marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_extreme_arguments(case, regime):
    rng = np.random.default_rng(0)
    for _ in range(20):
        inputs, ids = _extreme(rng, case, regime)
        expected = truth(case, inputs, ids)
        got = jax.device_get(everything(case, "chunked", inputs, ids))
        assert_close(got, expected, TOLERANCE["float32"])
