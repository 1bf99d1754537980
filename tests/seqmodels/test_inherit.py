"""Weight inheritance by rule: what is copied, between which stacks, and what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import language_model
from seqmodels.linearize import inherit, partition

CONFIG = {"vocab_size": 31, "d_model": 16, "d_ff": 16, "num_layers": 5}
TEACHER = CONFIG | {"pattern": "attention(num_heads=4, num_kv_heads=2, max_length=64)"}
STUDENT = CONFIG | {
    "pattern": "2*lolcats(num_heads=4, num_kv_heads=2, window=4) + gla(num_heads=2)"
}


@functools.cache
def model_and_params(seed, **fields):
    """Returns a model and parameters of its shapes, each value different from all others."""
    model = language_model.from_config(fields)
    shapes = nn.unbox(
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    )
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), shapes)


def teacher(**changes):
    return model_and_params(0, **TEACHER | changes)


def student(**changes):
    return model_and_params(1, **STUDENT | changes)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_all_but_attention(scan_layers):
    """The teacher scans over its five layers; the student over pairs or none."""
    found = inherit.inherit(teacher(), student(scan_layers=scan_layers))
    theirs = inherit.paths(*teacher())
    before = inherit.paths(*student(scan_layers=scan_layers))
    after = inherit.paths(student(scan_layers=scan_layers)[0], found.params)
    assert set(after) == set(before) == {*found.taken, *found.new}
    for path, leaf in after.items():
        inherited = "/mixer/" not in path
        assert inherited == (path in found.taken)
        np.testing.assert_array_equal(leaf, theirs[path] if inherited else before[path])
    assert {path.split("/mixer/")[1] for path in found.left} == {f"{n}/kernel" for n in "qkvo"}
    report = found.report()
    assert report.startswith(f"{len(found.taken)} of {len(after)} parameters are inherited; new:")
    assert "layers/*/mixer/q_map/kernel" in report and "mixer_norm" not in report
    expected = partition.flatten(student(scan_layers=scan_layers)[1])
    assert {k: x.shape for k, x in partition.flatten(found.params).items()} == {
        k: x.shape for k, x in expected.items()
    }


@pytest.mark.parametrize("rule", ["q", "k", "v", "kv", "qkv", "qkvo"])
def test_projections_of_the_attention(rule):
    same = student(pattern="lolcats(num_heads=4, num_kv_heads=2, window=4)")
    found = inherit.inherit(teacher(), same, rule)
    projections = {p.split("/")[3] for p in found.taken if "/mixer/" in p}
    assert projections == set(rule)
    assert "embed/embedding" in found.taken and "layers/4/mixer_norm/scale" in found.taken
    assert not {*found.taken} & {*found.left}


def test_nothing_and_everything():
    none = inherit.inherit(teacher(), student(), "none")
    jax.tree.map(np.testing.assert_array_equal, none.params, student()[1])
    assert not none.taken
    other = model_and_params(2, **TEACHER)
    whole = inherit.inherit(teacher(), other, "all")
    jax.tree.map(np.testing.assert_array_equal, whole.params, teacher()[1])
    assert not whole.new and not whole.left


def test_a_round_trip():
    """What a student inherited and gives back restores the teacher; dtypes are each one's own."""
    half = student(param_dtype="bfloat16")
    found = inherit.inherit(teacher(), half)
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), found.params, half[1])
    model, params = teacher()
    blank = model, jax.tree.map(jnp.zeros_like, params)
    kept = inherit.inherit((half[0], found.params), blank)
    again = inherit.inherit((model, params), (model, kept.params), r"/mixer/[qkvo]/kernel$")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), again.params, params)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="the teacher has 5, the student 4"):
        inherit.inherit(teacher(), student(num_layers=4))
    with pytest.raises(ValueError, match="'attention' matches no parameter.*all_but_attention"):
        inherit.inherit(teacher(), student(), "attention")
    with pytest.raises(
        ValueError, match=r"layers/0/channel_mixer.*teacher \(16, 16\), student \(16, 24\)"
    ):
        inherit.inherit(teacher(), student(d_ff=24))
    with pytest.raises(ValueError, match=r"rule 'k'.*\n.*teacher \(16, 8\), student \(16, 16\)"):
        inherit.inherit(teacher(), student(pattern="lolcats(num_heads=4, window=4)"), "k")
    with pytest.raises(ValueError, match="layers/0/mixer/k/kernel: .* has none"):
        inherit.inherit(teacher(), student(pattern="lru"), "k")
