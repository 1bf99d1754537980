"""Eight simulated devices in one process, strict shapes, quick compilation: set before JAX starts.

Tests run small programs once, so compiling them is most of the work, and half of that is
optimisation. It is off here; SEQMODELS_TESTS_OPTIMIZED=1 leaves it on, which `.ci/run` does for the
operators on the newest JAX.
"""

import gc
import importlib.metadata
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On a GPU or a TPU, tests neither trust nor write a user's records of checked kernels.
os.environ["SEQMODELS_CACHE"] = os.path.join(
    tempfile.gettempdir(), f"seqmodels-tests-{os.getpid()}"
)
# Triton decides when it is imported whether kernels are interpreted, and torch may import it first.
os.environ.setdefault("TRITON_INTERPRET", "1")
quick = os.environ.get("SEQMODELS_TESTS_OPTIMIZED") != "1"
# What a worker, or a program that a test starts, took its time to compile, the others read.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="seqmodels-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
flags = [os.environ.get("XLA_FLAGS", "")]
# Pytest's workers fill the cores; a program compiled in parts is compiled a third longer.
flags.append("--xla_cpu_parallel_codegen_split_count=1")
if quick and importlib.metadata.version("jax").startswith("0.10."):  # later ones have no choice
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
if quick:  # in the programs that tests start, too
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a twelfth of the time goes to them

import jax  # noqa: E402
import pytest  # noqa: E402

gc.set_threshold(100_000, 20, 20)  # tracing makes many objects and few cycles

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Drops a test file's compiled programs, of no use to the next: memory stays flat."""
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is exhaustive is slow too: `-m "not slow"` takes the place of setup.cfg's -m."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)
