"""Which implementation serves a run, as its config asks and as its first step says."""

import jax
import jax.numpy as jnp
import pytest

from experiments.training import loop
from seqmodels import mixers
from tests.experiments import tiny


def _train(folder, pattern, num_layers=1, steps=1, mesh=None):
    config = tiny.make_config(folder, pattern=pattern, num_layers=num_layers)
    config.train.steps = steps
    config.schedule.warmup_steps = 0
    config.mesh.update(mesh or {})
    return loop.train(config, folder / "run", jax.devices()[: 4 if mesh else 1])


def test_a_config_sets_the_chunk_size(tmp_path):
    assert _train(tmp_path, "gla(num_heads=2, chunk_size=32)")["steps"] == 1


def test_a_chunk_size_reaches_the_operator():
    x_BTD = jnp.zeros((1, 64, 16))

    def program(chunk_size):
        mixer = mixers.make("gla", d_model=16, num_heads=2, chunk_size=chunk_size)
        params = jax.eval_shape(mixer.init, jax.random.key(0), x_BTD)
        return str(jax.make_jaxpr(mixer.apply)(params, x_BTD))

    assert "16,16]" in program(16) and program(16) != program(32)


def test_a_wrong_chunk_size_raises_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="chunk_size is 33; expected a power of two, 16 or more"):
        _train(tmp_path, "gla(num_heads=2, chunk_size=33)")
    with pytest.raises(ValueError, match="mamba: chunk_size must be at least 1; got 0"):
        _train(tmp_path, "mamba(chunk_size=0)")
    assert not (tmp_path / "run").exists()


def test_mixers_without_chunks_say_so():
    with pytest.raises(ValueError, match="mixer 'rg_lru' has no option 'chunk_size'; it has"):
        mixers.make("rg_lru", d_model=8, chunk_size=32)
    without = {name for name in mixers.causal_names() if "chunk_size" not in mixers.options(name)}
    mixing = {"mlp_mixer_causal", "shallow_ffn_causal", "sparse_mlp_causal"}  # products over time
    assert without == mixing | {"attention", "hgrn", "lru", "rg_lru", "transnormer_local"}


def test_the_first_step_says_what_serves_and_why_nothing_better_does(tmp_path, capsys):
    """One line for each operator and kind of call, however many layers and steps there are."""
    _train(tmp_path, "2*gla(num_heads=2) + attention(window=8, num_heads=2)", num_layers=3, steps=3)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    (gla,) = [line for line in lines if line.startswith("linear_attention (")]
    assert gla == (
        "linear_attention (per_channel float32): chunked. Not one_token: it takes one token; "
        "got T = 32. Not pallas_tpu: it is a kernel for tpu; this is cpu. Not triton: it is a "
        "kernel for gpu; this is cpu"
    )
    (attention,) = [line for line in lines if line.startswith("softmax_attention (")]
    assert attention.startswith("softmax_attention (causal window packed float32): xla. Not splash")
    assert len([line for line in lines if line.startswith("linear_cross_entropy")]) == 1


def test_a_run_on_a_mesh_says_it_too(tmp_path, capsys):
    _train(tmp_path, "gla(num_heads=2, implementation='reference')", mesh={"data": 2, "seq": 2})
    line = "linear_attention (per_channel float32): reference. Not one_token: 'reference' was asked"
    assert line in capsys.readouterr().err
