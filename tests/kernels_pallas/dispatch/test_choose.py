"""Choosing an implementation: the named one or an error that says why, the first that can run for
None."""

import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import (
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    diagonal_scan,
    dispatch,
    explain,
    linear_attention,
    ops,
    softmax_attention,
)
from kernels_pallas.dispatch import devices
from kernels_pallas.tools import tpu_compile

SMALL = dispatch.Implementation(
    "small", lambda T: "small", lambda T: None if T < 8 else f"T = {T} is not below 8"
)
ANY = dispatch.Implementation("any", lambda T: "any")


def operator(T):
    """What the fake implementations stand for."""


def _chosen(implementations, name, T):
    chosen = dispatch.choose(dispatch.Operator(operator, implementations), name, T=T)
    return chosen.call(T)


def test_none_takes_the_first_that_supports_the_call():
    assert _chosen((SMALL, ANY), None, 4) == "small"
    assert _chosen((SMALL, ANY), None, 9) == "any"


def test_a_named_one_is_taken_though_another_comes_first():
    assert _chosen((SMALL, ANY), "any", 4) == "any"


def test_a_named_one_that_cannot_run_says_why_and_does_not_fall_back():
    with pytest.raises(NotImplementedError, match="operator: .*'small' cannot run here: T = 9"):
        _chosen((SMALL, ANY), "small", 9)


def test_nothing_that_can_run_lists_the_reasons():
    with pytest.raises(NotImplementedError, match="small: T = 9 is not below 8"):
        _chosen((SMALL,), None, 9)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(
        ValueError, match="unknown implementation 'x'; choose one of 'small', 'any'"
    ):
        _chosen((SMALL, ANY), "x", 4)


def test_a_kernel_for_another_platform_is_passed_over_and_named_only_where_it_can_run():
    kernel = dispatch.Implementation("kernel", lambda T: "kernel", platform="tpu")
    assert _chosen((kernel, ANY), None, 4) == "any"
    with pytest.raises(NotImplementedError, match="it is a kernel for tpu; this is cpu"):
        _chosen((kernel, ANY), "kernel", 4)
    with devices.interpreted():
        assert _chosen((kernel, ANY), "kernel", 4) == "kernel"
        assert _chosen((kernel, ANY), None, 4) == "any"


def test_tpu_kernels_are_passed_over_and_refused_with_64_bit_types():
    """They end the process while they compile there, so nothing may come that far."""
    q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 256, 128), jnp.float32)
    w = jax.ShapeDtypeStruct((4, 128), jnp.float32)
    calls = {
        linear_attention: (q, q, q),
        delta_rule: (q, q, q, jax.ShapeDtypeStruct((1, 256, 2), jnp.float32)),
        diagonal_scan: (x, x),
        causal_conv: (x, w),
        softmax_attention: (q, q, q),
    }
    with tpu_compile.tracing_for("v6e"):
        for operator, arguments in calls.items():
            kernels = str(jax.make_jaxpr(operator)(*arguments)).count("pallas_call")
            with jax.enable_x64(True):
                others = str(jax.make_jaxpr(operator)(*arguments)).count("pallas_call")
            assert (kernels > 0, others) == (True, 0), operator
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="jax_enable_x64 is on"):
            jax.eval_shape(lambda *x: linear_attention(*x, implementation="pallas_tpu"), q, q, q)


@pytest.mark.slow
def test_what_takes_their_place_compiles():
    q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    with jax.enable_x64(True):
        compiled = tpu_compile.compile_for("v6e", linear_attention, q, q, q)
    assert not compiled.listings


def test_the_abstract_device_in_scope_is_the_target():
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    kernel = dispatch.Implementation("kernel", lambda T: "kernel", platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert devices.current() == ("tpu", "TPU v6 lite")
        assert _chosen((kernel, ANY), None, 4) == "kernel"
    assert devices.current().platform == "cpu"


def test_arrays_committed_to_the_cpu_take_no_kernel(monkeypatch):
    """On a machine whose first device is a GPU; differentiated, too. Others go to that device."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    cpu = jax.devices("cpu")[0]
    free, held = jnp.ones(3), jax.device_put(jnp.ones(3), cpu)
    kernel = dispatch.Implementation("kernel", lambda x: "kernel", platform="gpu")
    plain = dispatch.Implementation("any", lambda x: devices.current().platform)
    monkeypatch.setattr(jax, "devices", lambda platform=None: [gpu])
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])

    def chosen(x, name=None):
        served = dispatch.Operator(operator, (kernel, plain))
        return dispatch.choose(served, name, x=x).call(x)

    assert chosen(free) == "kernel"
    assert chosen(held) == "cpu"  # while it is traced, too
    assert chosen(held, "any") == "cpu"
    with pytest.raises(NotImplementedError, match="it is a kernel for gpu; this is cpu"):
        chosen(held, "kernel")
    seen = []
    jax.grad(lambda x: seen.append(chosen(x)) or x.sum())(held)
    assert seen == ["cpu"]


def test_the_default_device_in_scope_is_the_target(monkeypatch):
    """On a machine whose first device is a GPU, what is put on its CPU takes no kernel."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu if platform == "cpu" else gpu])
    assert devices.current() == ("gpu", "NVIDIA H200")
    for device in (cpu, "cpu"):
        with jax.default_device(device):
            assert devices.current().platform == "cpu"


def test_one_that_is_passed_over_serves_where_it_is_named():
    slow = dispatch.Implementation(
        "slow", lambda T: "slow", passed_over_reason=lambda T: "T is small" if T < 8 else None
    )
    assert _chosen((slow, ANY), None, 4) == "any"
    assert _chosen((slow, ANY), None, 9) == "slow"
    assert _chosen((slow, ANY), "slow", 4) == "slow"


def test_what_serves_is_recorded_with_the_reasons_against_better_ones():
    """Once for each operator, kind of call and implementation, and inside the block alone."""
    kernel = dispatch.Implementation("kernel", lambda T: "kernel", platform="tpu")
    with dispatch.recorded() as choices:
        for name, T in ((None, 4), (None, 9), (None, 10), ("small", 4)):
            _chosen((kernel, SMALL, ANY), name, T)
    reason = "it is a kernel for tpu; this is cpu"
    assert list(map(str, choices)) == [
        f"operator: small. Not kernel: {reason}",
        f"operator: any. Not kernel: {reason}. Not small: T = 9 is not below 8",
    ]


def test_explain():
    """On arrays and on their shapes alike; every argument an operator has may be given."""
    q, beta = jnp.zeros((1, 20, 2, 16), jnp.bfloat16), jnp.zeros((1, 20, 2))
    ids = jnp.ones((1, 20), jnp.int32)
    expected = {
        "one_token": "it takes one token; got T = 20",
        "pallas_tpu": "it is a kernel for tpu; this is cpu",
        "triton": "it is a kernel for gpu; this is cpu",
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, beta, ids))
    for x, b, i in ((q, beta, ids), shapes):
        found = explain(delta_rule, x, x, x, b, scale=0.5, segment_ids=i, chunk_size=16)
        assert found == dispatch.Choice("delta_rule", "per_token bfloat16", "chunked", expected)
    named = explain(delta_rule, q, q, q, beta, implementation="reference")
    assert named.implementation == "reference"
    assert named.passed_over["chunked"] == "'reference' was asked for"
    assert explain(softmax_attention, q, q, q, window=4).passed_over["chunked"].startswith("for 20")
    x, w = jnp.zeros((1, 15, 8)), jnp.zeros((4, 8))
    with tpu_compile.tracing_for("v6e"):
        assert "T = 15" in explain(causal_conv, x, w).passed_over["pallas_tpu"]
        assert explain(linear_attention, q, q, q).implementation == "pallas_tpu"


def test_explain_raises_where_the_call_would_and_where_nothing_is_chosen():
    q = jnp.zeros((1, 4, 2, 16))
    with pytest.raises(NotImplementedError, match="it is a kernel for tpu; this is cpu"):
        explain(linear_attention, q, q, q, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="linear_attention: nothing is chosen"):
        explain(linear_attention, q[:, :0], q[:, :0], q[:, :0])


@pytest.mark.parametrize(
    "step, operator",
    [
        (ops.linear_attention.step, linear_attention),
        (ops.delta_rule.step, delta_rule),
        (ops.delta_rule.step_diagonal_plus_low_rank, diagonal_plus_low_rank),
        (ops.diagonal_scan.step, diagonal_scan),
        (ops.causal_conv.step, causal_conv),
        (ops.softmax_attention.step, softmax_attention),
    ],
    ids=lambda x: x.__name__,
)
def test_every_operator_has_a_documented_step(step, operator):
    assert step.__doc__.startswith(f"One token of `{operator.__name__}`")
