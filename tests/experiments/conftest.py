"""Fixtures that tests of the binaries share."""

import importlib.util

import pytest

# The harness and its model for transformers are there with the extras [eval] and [oracles].
if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "torch", "accelerate")):
    collect_ignore = ["inference/test_lm_eval_adapter.py"]


@pytest.fixture(scope="session")
def launcher():
    """Returns what starts the binaries in processes of their own."""
    from tests.experiments import processes  # what it imports takes seconds

    return processes.Launcher()
