"""One process, eight simulated devices, strict shapes: set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """A test file's compiled programs are of no use to the next; dropping them keeps memory flat."""
    yield
    jax.clear_caches()
