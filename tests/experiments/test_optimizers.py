import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments import optimizers
from seqmodels import language_model

NAMES = ["adamw", "lamb", "lion", "muon", "schedule_free", "sgd"]


def config(name, **fields):
    defaults = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}
    return ConfigDict({"name": name, **defaults, **fields})


def boxed(array, *names):
    return nn.LogicallyPartitioned(array, names)


def model_params(scan_layers):
    fields = {"pattern": "gated_delta_net", "num_layers": 2, "vocab_size": 11, "d_model": 16}
    model = language_model.from_config(fields | {"scan_layers": scan_layers})
    return jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 4), int))["params"], jax.random.key(0)
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_touches_matrices_only(scan_layers):
    mask = optimizers.decay_mask(optimizers.ranks(model_params(scan_layers)))
    flat = {optimizers.path_name(p): m for p, m in jax.tree_util.tree_flatten_with_path(mask)[0]}
    decayed = {path for path, touched in flat.items() if touched}
    spared = {path.split("/")[-1] for path in flat.keys() - decayed}
    assert {"A_log", "dt_bias", "scale"} <= spared
    assert spared <= {"A_log", "dt_bias", "scale", "bias"}
    assert {path.split("/")[-1] for path in decayed} == {"kernel", "embedding"}
    assert any("blocks/" in path for path in flat) == scan_layers


def test_parameters_of_gates_are_never_decayed_whatever_their_rank():
    params = {
        "ssm": {
            "A_log": boxed(jnp.ones((3, 4, 8)), "layers", "heads", None),
            "D": jnp.ones((4, 2)),
            "lrpe": {"theta": jnp.ones((4, 2))},  # angles, one a channel
        },
        "lower_bounds": jnp.ones((3, 4)),
        "q_norm": {"weight": jnp.ones((2, 4))},
        "vector": boxed(jnp.ones((3, 4)), "layers", "heads"),
        "kernel": boxed(jnp.ones((3, 4, 4)), "layers", "embed", "heads"),
    }
    mask = optimizers.decay_mask(optimizers.ranks(params))
    touched = [
        optimizers.path_name(p) for p, m in jax.tree_util.tree_flatten_with_path(mask)[0] if m
    ]
    assert touched == ["kernel"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_takes_the_linear_layers_and_leaves_embeddings_and_convolutions(scan_layers):
    dimensions = optimizers.muon_dimensions(optimizers.ranks(model_params(scan_layers)))
    leaves = jax.tree_util.tree_flatten_with_path(
        dimensions, is_leaf=lambda x: x is None or hasattr(x, "_fields")
    )[0]
    taken = {optimizers.path_name(path) for path, numbers in leaves if numbers is not None}
    left = {optimizers.path_name(path) for path, numbers in leaves if numbers is None}
    assert all(path.endswith("kernel") and "conv" not in path for path in taken)
    assert any(path.endswith("mixer/q/kernel") for path in taken)
    assert any("conv" in path for path in left) and "embed/embedding" in left


@pytest.mark.parametrize("name", NAMES)
def test_reduces_a_quadratic_and_treats_stacked_layers_as_layers(name):
    """The same two layers once stacked and once apart: same updates, and the loss falls."""
    rate = 0.1 if name == "muon" else 0.02  # its update has an rms of 0.2
    key_q, key_p = jax.random.split(jax.random.key(0))
    target_LDF = jax.random.normal(key_q, (2, 6, 6))
    kernel_LDF = 2 * jax.random.normal(key_p, (2, 6, 6))
    scale_LD = jnp.ones((2, 6))
    stacked = {
        "kernel": boxed(kernel_LDF, "layers", "embed", "mlp"),
        "norm": {"scale": boxed(scale_LD, "layers", "norm")},
    }
    apart = [{"kernel": kernel_LDF[i], "norm": {"scale": scale_LD[i]}} for i in range(2)]

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


def test_clip_bounds_the_global_norm():
    params = {"kernel": jnp.zeros((3, 3))}
    optimizer = optimizers.make_optimizer(config("sgd", clip=0.5), lambda n: 1.0, params)
    updates, _ = optimizer.update({"kernel": jnp.full((3, 3), 7.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_schedule_free_evaluates_its_average():
    """With learning rate r and constant gradient g: z_t = -t r g, and x_t is the mean of z_1 to z_t."""
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
