"""Which implementation serves a run, as its config asks and as its first step says."""

import jax
import pytest

from experiments.training import loop
from seqmodels import mixers
from tests.experiments import tiny


def _train(folder, pattern):
    config = tiny.make_config(folder, pattern=pattern)
    config.train.steps = 1
    config.schedule.warmup_steps = 0
    return loop.train(config, folder / "run", jax.devices()[:1])


def test_a_config_sets_the_chunk_size(tmp_path):
    assert _train(tmp_path, "gla(num_heads=2, chunk_size=32)")["steps"] == 1


def test_a_wrong_chunk_size_raises_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="chunk_size is 33; expected a power of two, 16 or more"):
        _train(tmp_path, "gla(num_heads=2, chunk_size=33)")
    assert not (tmp_path / "run").exists()


def test_mixers_without_chunks_say_so():
    with pytest.raises(ValueError, match="mixer 'rg_lru' has no option 'chunk_size'; it has"):
        mixers.make("rg_lru", d_model=8, chunk_size=32)
    without = {name for name in mixers.names() if "chunk_size" not in mixers.options(name)}
    assert without == {"attention", "hgrn", "lru", "rg_lru", "transnormer_local"}
