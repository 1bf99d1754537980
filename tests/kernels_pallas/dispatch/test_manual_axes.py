"""Operators under `jax.shard_map` as it comes, with `check_vma`, and under a mesh with explicit
axes: as without either.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kernels_pallas
from kernels_pallas import context_parallel

B, T, H, K, D, W = 2, 16, 2, 4, 6, 10
SAME = PartitionSpec()
SPLIT = {"batch": PartitionSpec("part"), "time": PartitionSpec(None, "part")}
ARRAYS = {name: (B, T, H, K) for name in ("q", "k", "v", "a", "b", "log_decay_BTHK")} | {
    "beta": (B, T, H),
    "log_decay": (H,),
    "x": (B, T, D),
    "decay": (D,),
    "w": (4, D),
    "bias": (D,),
    "matrix": (W, D),
    "initial_state": (B, H, K, K),
}
WITH_TIME = {"q", "k", "v", "a", "b", "log_decay_BTHK", "beta", "x", "segment_ids", "labels_BT"}
KEYWORDS = {"bias", "initial_state"}
CALLS = {
    "linear_attention": ("linear_attention", "q k v log_decay initial_state", {}),
    "linear_attention per channel": ("linear_attention", "q k v log_decay_BTHK", {}),
    "delta_rule": ("delta_rule", "q k v beta", {}),
    "delta_rule with a decay": ("delta_rule", "q k v beta log_decay initial_state", {}),
    "diagonal_plus_low_rank": ("diagonal_plus_low_rank", "q k v a b log_decay", {}),
    "diagonal_scan": ("diagonal_scan", "x decay", {}),
    "document_sums": ("document_sums", "q k v initial_state", {}),
    "document_sums in blocks": ("document_sums", "q k v initial_state", {"block_size": 3}),
    "causal_conv": ("causal_conv", "x w bias", {"activation": "silu"}),
    "softmax_attention": ("softmax_attention", "q k v", {"implementation": "chunked"}),
    "linear_cross_entropy": ("linear_cross_entropy", "x matrix", {"chunk_size": 6, "z_loss": 0.1}),
}


def _inputs(names):
    rng = np.random.default_rng(0)
    arrays = {name: 0.5 * rng.standard_normal(ARRAYS[name]) for name in names}
    for name, x in arrays.items():
        if name.startswith("log_decay"):
            arrays[name] = -abs(x)
        elif name in ("decay", "beta"):
            arrays[name] = np.tanh(abs(x))
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def _function(module, name, axis_name=None):
    """A call of `CALLS`, of a dict of arrays: the results over time."""
    operator, order, keywords = CALLS[name]
    if axis_name is not None:
        keywords = keywords | {"axis_name": axis_name}

    def call(inputs):
        named = {n: x for n, x in inputs.items() if n not in order.split() or n in KEYWORDS}
        positional = [inputs[n] for n in order.split() if n not in KEYWORDS]
        results = getattr(module, operator)(*positional, **named, **keywords)
        return results[0] if isinstance(results, tuple) else results

    return call


def _with_gradients(function, inputs):
    """Results, and gradients of a sum that weighs each number differently."""

    def loss(floats, ids):
        y = function(floats | ids)
        return jnp.sum(jnp.sin(3 * y)), y

    ids = {name: x for name, x in inputs.items() if x.dtype.kind == "i"}
    floats = {name: x for name, x in inputs.items() if name not in ids}
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats, ids)
    return {"results": y} | gradients


def _mesh():
    return jax.make_mesh((2,), ("part",), (AxisType.Auto,), devices=jax.devices()[:2])


def _compare(got, expected):
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=2e-5, rtol=2e-5, err_msg=name)


CASES = [(name, split) for name in CALLS for split in SPLIT]
CASES.remove(("linear_cross_entropy", "time"))  # it has no time: that is a batch
SLOW = (
    "linear_attention per channel",
    "delta_rule",
    "diagonal_plus_low_rank",
    "document_sums",
)


@pytest.mark.parametrize(
    "name, split",
    [pytest.param(*c, marks=[pytest.mark.slow] if c[0] in SLOW else []) for c in CASES],
)
def test_equals_the_whole(name, split):
    """Results, and gradients; those of what every device has are sums over devices."""
    inputs = _inputs(CALLS[name][1].split())
    if name == "linear_cross_entropy":
        inputs["labels_BT"] = np.arange(B * T, dtype=np.int32).reshape(B, T) % W
    else:
        inputs["segment_ids"] = np.array([[1, 1, 1, 2, 2, 1, 1, 1] * 2] * B, np.int32)
    split_names = WITH_TIME | ({"initial_state"} if split == "batch" else set())
    specs = {n: SPLIT[split] if n in split_names else SAME for n in inputs}
    if split == "time":
        part = _function(context_parallel, name, "part")
    else:
        part = _function(kernels_pallas, name)
    sharded = jax.shard_map(part, mesh=_mesh(), in_specs=(specs,), out_specs=SPLIT[split])
    expected = _with_gradients(_function(kernels_pallas, name), inputs)
    _compare(_with_gradients(sharded, inputs), expected)


def test_gradients_taken_inside():
    """Of a loss that each device has of its own rows: a replicated operand gets the sum over
    devices.
    """
    name = "delta_rule with a decay"
    inputs = _inputs(CALLS[name][1].split())
    call = _function(kernels_pallas, name)
    gradients = jax.grad(lambda inputs: jnp.sum(jnp.sin(3 * call(inputs))))
    specs = {name: SAME if name == "log_decay" else SPLIT["batch"] for name in inputs}
    inside = jax.shard_map(gradients, mesh=_mesh(), in_specs=(specs,), out_specs=specs)
    _compare(jax.jit(inside)(inputs), jax.jit(gradients)(inputs))


def test_words_split_over_devices():
    """The vocabulary's matrix by parts: the loss is the same everywhere, and x's gradient is
    summed over the parts.
    """
    inputs = _inputs(["x", "matrix"])
    labels = np.arange(B * T, dtype=np.int32).reshape(B, T) % W

    def loss(axis, inputs):
        call = functools.partial(
            kernels_pallas.linear_cross_entropy, labels_BT=labels, chunk_size=6
        )
        return call(inputs["x"], inputs["matrix"], words_axis=axis)

    specs = {"x": SAME, "matrix": PartitionSpec("part")}
    split = jax.shard_map(
        functools.partial(loss, "part"), mesh=_mesh(), in_specs=(specs,), out_specs=SAME
    )
    whole = functools.partial(loss, None)
    _compare(_with_gradients(split, inputs), _with_gradients(whole, inputs))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CALLS]
)
def test_explicit_axes(name):
    """Arrays whose types have their shardings, in and out, and through the gradient."""
    inputs = _inputs(CALLS[name][1].split())
    if name == "linear_cross_entropy":
        inputs["labels_BT"] = np.arange(B * T, dtype=np.int32).reshape(B, T) % W
    call = _function(kernels_pallas, name)
    expected = _with_gradients(call, inputs)
    mesh = jax.make_mesh(
        (2, 2), ("part", "heads"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    by_rank = {2: SPLIT["batch"], 3: SPLIT["batch"], 4: PartitionSpec("part", None, "heads")}
    specs = {n: by_rank[x.ndim] if n in WITH_TIME else SAME for n, x in inputs.items()}
    with jax.set_mesh(mesh):
        split = {n: jax.device_put(x, jax.NamedSharding(mesh, specs[n])) for n, x in inputs.items()}
        got = _with_gradients(call, split)
    _compare(got, expected)
    first = CALLS[name][1].split()[0]
    axes = jax.typeof(got["results"]).sharding.spec
    assert axes[: len(specs[first])] == specs[first][: len(axes)]
