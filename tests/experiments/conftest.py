"""Compiled programs are kept on disk for a session: resuming compiles the same ones again."""

import importlib.util

import jax
import pytest

# The harness and its model for transformers are there with the extras [eval] and [oracles].
if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "torch", "accelerate")):
    collect_ignore = ["test_lm_eval_adapter.py"]


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield settings
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def launcher(compilation_cache):
    """Starts the binaries in processes of their own, which keep compiled programs there too."""
    from tests.experiments import processes  # what it imports takes seconds

    return processes.Launcher(compilation_cache | {"jax_disable_most_optimizations": True})
