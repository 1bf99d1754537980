import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments.training import optimizers
from seqmodels import language_model, mixers
from seqmodels.linearize import layer_trees, lora
from seqmodels.modules import layers, norms
from tests.seqmodels.mixers import mixer_suite


def config(name, **fields):
    defaults = {
        "learning_rate": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,
    }
    return ConfigDict({"name": name, **defaults, **fields})


def flat(tree):
    """Returns leaves by path. None is a leaf, too."""
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or hasattr(x, "_fields")
    )[0]
    return {optimizers.path_name(path): leaf for path, leaf in leaves}


MODEL = {"pattern": "gated_delta_net", "num_layers": 2, "vocab_size": 11, "d_model": 16}


def model_params(scan_layers, **fields):
    model = language_model.from_config(MODEL | {"scan_layers": scan_layers} | fields)
    return jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 4), int))["params"], jax.random.key(0)
    )


class Gated(mixers.Mixer):
    """A mixer whose gate has two axes, with names that say nothing."""

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        shape = (x_BTD.shape[-1], 3)
        strength_DK = layers.gate_parameter(self, "strength", nn.initializers.ones, shape)
        mixed_DK = self.param("mixed", nn.initializers.ones, shape)
        gain_DK = self.param("gain", layers.undecayed(nn.initializers.ones, (None, None)), shape)
        y_BTD = self.project(x_BTD, self.d_model, "conv_output", use_bias=True)
        return y_BTD * jnp.sum(strength_DK * mixed_DK * gain_DK, axis=1)[None, None], None

    def init_state(self, batch):
        return None


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_parameter_says_itself_whether_it_is_decayed(scan_layers, monkeypatch):
    monkeypatch.setattr(mixers, "mixer_class", lambda name: Gated)
    params = model_params(scan_layers)
    layer = params["blocks"]["block_0"] if scan_layers else params["block_0"]
    assert nn.meta.unbox(layer["mixer"]["strength"]).ndim == 2 + scan_layers
    block, none = ("blocks/block_0", "blocks/block_1") if scan_layers else ("block_0", "block_1")
    decayed = {path for path, touched in flat(optimizers.decay_mask(params)).items() if touched}
    assert {path for path in decayed if path.startswith(f"{block}/mixer")} == {
        f"{block}/mixer/conv_output/kernel",
        f"{block}/mixer/mixed",
    }
    assert any(path.startswith(none) for path in decayed) != scan_layers
    assert "embed/embedding" in decayed
    muon = flat(optimizers.muon_dimensions(params))
    assert muon[f"{block}/mixer/conv_output/kernel"] is not None
    assert muon[f"{block}/mixer/mixed"] is muon[f"{block}/mixer/strength"] is None


WEIGHTS = re.compile("kernel|[a-z]_kernel")
OTHERS = re.compile(
    r"A_log|D|Lambda|dt_bias|factor|(gamma|nu|theta)_log|mix_logit|theta|(\w+_)?bias|embedding"
)
GAINS = re.compile(r"(\w+_)?scale|gate")


@pytest.mark.parametrize("name", mixers.names())
def test_of_every_mixer_weights_are_decayed_and_gates_gains_and_biases_are_not(name):
    for options in mixer_suite.SMALL_OPTIONS.get(name, ({},)):
        mixer = mixers.make(name, **{"d_model": 32} | options)
        layer = mixers.Layer(0, 2, jnp.zeros(mixer.lower_bound_width()))
        x_BTD = jnp.zeros((1, math.prod(getattr(mixer, "grid", None) or (4,)), 32))
        params = jax.eval_shape(mixer.init, jax.random.key(0), x_BTD, layer=layer)["params"]
        boxes = jax.tree_util.tree_flatten_with_path(params, is_leaf=layers.is_boxed)[0]
        mask = flat(optimizers.decay_mask(params))
        for path, box in boxes:
            path, last = optimizers.path_name(path), optimizers.path_name(path[-1:])
            kinds = [bool(kind.fullmatch(last)) for kind in (WEIGHTS, OTHERS, GAINS)]
            assert sum(kinds) == 1, f"{path}: a new kind of parameter; should it be decayed?"
            assert mask[path] == kinds[0], path
            assert isinstance(box, layers.Undecayed) != kinds[0], path


@pytest.mark.parametrize("norm", norms.NORMS)
def test_what_a_stack_adds_to_its_mixers(norm):
    fields = {"pattern": "hgrn2(expand_ratio=8)", "channel_mixer": "moe", "norm": norm}
    fields |= {"learned_positions": 8, "tied_embeddings": False, "norm_position": "sandwich"}
    mask = flat(optimizers.decay_mask(model_params(True, **fields)))
    decayed = {path.split("/")[-1] for path, touched in mask.items() if touched}
    spared = {path.split("/")[-1] for path, touched in mask.items() if not touched}
    assert decayed == {
        "embedding", "position_embedding", "kernel", "gate_kernel", "up_kernel", "down_kernel"
    }  # fmt: skip
    assert spared <= {"lower_bounds", "scale", "bias"} and "lower_bounds" in spared


def test_boxes_stay_with_parameters_that_a_linearization_moves():
    fields = MODEL | {"pattern": "mamba2(head_dim=16)", "num_layers": 3}
    model, params = language_model.from_config(fields), model_params(True, **fields)
    shared, apart = layer_trees.split(model, params)
    assert isinstance(apart[1]["mixer"]["decay"]["A_log"], layers.Undecayed)
    again = layer_trees.join(model, shared, apart)
    assert optimizers.decay_mask(again) == optimizers.decay_mask(params)
    adapters = lora.init(jax.random.key(0), params, "mixer/o/kernel", 2)
    assert all(jax.tree.leaves(optimizers.decay_mask(adapters)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_takes_the_linear_layers_and_leaves_embeddings_and_convolutions(scan_layers):
    dimensions = flat(optimizers.muon_dimensions(model_params(scan_layers)))
    taken = {path for path, numbers in dimensions.items() if numbers is not None}
    left = dimensions.keys() - taken
    assert all(path.endswith("kernel") and "conv" not in path for path in taken)
    assert any(path.endswith("mixer/q/kernel") for path in taken)
    assert any("conv" in path for path in left) and "embed/embedding" in left


@pytest.mark.parametrize("name", optimizers.names())
def test_reduces_a_quadratic_and_treats_stacked_layers_as_layers(name):
    """Two layers get the same updates stacked and apart, and their loss falls."""
    rate = 0.1 if name == "muon" else 0.02  # its update has an rms of 0.2
    key_q, key_p = jax.random.split(jax.random.key(0))
    target_LDF = jax.random.normal(key_q, (2, 6, 6))
    kernel_LDF = 2 * jax.random.normal(key_p, (2, 6, 6))
    scale_LD = jnp.ones((2, 6))
    stacked = {
        "kernel": layers.Kernel(kernel_LDF, ("layers", "embed", "mlp")),
        "norm": {"scale": layers.Undecayed(scale_LD, ("layers", "norm"))},
    }
    apart = [
        {
            "kernel": layers.Kernel(kernel_LDF[i], ("embed", "mlp")),
            "norm": {"scale": layers.Undecayed(scale_LD[i], ("norm",))},
        }
        for i in range(2)
    ]

    def loss_of(kernel, scale, target):
        return jnp.sum((kernel - target) ** 2) + jnp.sum(scale**2)

    def stacked_loss(p):
        return loss_of(p["kernel"], p["norm"]["scale"], target_LDF)

    def apart_loss(ps):
        return sum(loss_of(p["kernel"], p["norm"]["scale"], t) for p, t in zip(ps, target_LDF))

    def run(boxed_params, loss):
        optimizer = optimizers.make_optimizer(
            config(name, weight_decay=0.01), lambda step: rate, boxed_params
        )
        params = nn.meta.unbox(boxed_params)

        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        early, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        late, _ = jax.lax.scan(step, early, length=150)
        return loss(params), loss(optimizers.evaluation_params(*late)), early[0]

    before, after, together = jax.jit(lambda: run(stacked, stacked_loss))()
    _, _, separate = jax.jit(lambda: run(apart, apart_loss))()
    assert after < 0.5 * before
    for i in range(2):
        np.testing.assert_allclose(
            together["kernel"][i], separate[i]["kernel"], rtol=1e-5, atol=1e-5
        )


def test_weight_decay_is_decoupled_and_masked():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
    optimizer = optimizers.make_optimizer(config("adamw", weight_decay=0.5), lambda n: 0.1, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["bias"], 0.0)


@pytest.mark.parametrize("name", optimizers.names())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_have_a_state_and_an_update_in_float32(name, dtype):
    """Adam's eps is 0 in float16, and so is the square of a small gradient: 0 / 0."""
    params = {"kernel": layers.Kernel(jnp.ones((2, 2), dtype), ("embed", "mlp"))}
    optimizer = optimizers.make_optimizer(config(name, clip=0), lambda n: 0.5, params)
    opt_state, params = optimizer.init(params), nn.meta.unbox(params)
    grads = {"kernel": jnp.array([[1e-6, 0], [0, -1e-6]], dtype)}
    updates, opt_state = optimizer.update(grads, nn.meta.unbox(opt_state), params)
    assert updates["kernel"].dtype == jnp.float32 and jnp.all(jnp.isfinite(updates["kernel"]))
    assert updates["kernel"][0, 1] == 0 and updates["kernel"][0, 0] < 0
    floats = [x for x in jax.tree.leaves(opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)
    assert optax.apply_updates(params, updates)["kernel"].dtype == dtype


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"b1": 1.0}, "optimizer.b1 is 1.0; it must be at least 0, and less than 1"),
        ({"b2": -0.1}, "optimizer.b2 is -0.1; it must be at least 0, and less than 1"),
        ({"learning_rate": -0.1}, "optimizer.learning_rate is -0.1; it must be at least 0"),
        ({"eps": -1.0}, "optimizer.eps is -1.0; it must be at least 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay is -0.1; it must be at least 0"),
        ({"name": "schedule_free", "b1": 0.0}, "optimizer.b1 is 0; schedule_free's average"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields, message):
    fields = {"name": "adamw"} | fields
    with pytest.raises(ValueError, match=message):
        optimizers.make_optimizer(config(**fields), lambda n: 0.1, {"kernel": jnp.zeros((2, 2))})


def test_clip_bounds_the_global_norm():
    params = {"kernel": jnp.zeros((3, 3))}
    optimizer = optimizers.make_optimizer(config("sgd", clip=0.5), lambda n: 1.0, params)
    updates, _ = optimizer.update({"kernel": jnp.full((3, 3), 7.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_schedule_free_evaluates_its_average():
    """With rate r and constant gradient g, z_t = -t r g, and x_t is the mean of z_1 to z_t."""
    params = {"kernel": jnp.zeros((2, 2))}
    optimizer = optimizers.make_optimizer(config("schedule_free", clip=0), lambda n: 0.1, params)
    opt_state, current = optimizer.init(params), params
    for _ in range(3):
        updates, opt_state = optimizer.update({"kernel": jnp.ones((2, 2))}, opt_state, current)
        current = optax.apply_updates(current, updates)
    average = optimizers.evaluation_params(current, opt_state)["kernel"]
    np.testing.assert_allclose(average, -0.1 * (1 + 2 + 3) / 3, rtol=1e-4)


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="'adam'; choose one of adamw, lamb, lion, muon"):
        optimizers.make_optimizer(config("adam"), lambda n: 0.1, {"kernel": jnp.zeros((2, 2))})
