"""Choosing an implementation: the named one or an error that says why, the first that can run for
None."""

import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import (
    causal_conv,
    delta_rule,
    diagonal_scan,
    dispatch,
    linear_attention,
    softmax_attention,
)
from kernels_pallas.dispatch import devices
from kernels_pallas.tools import tpu_compile

SMALL = dispatch.Implementation(
    "small", lambda T: "small", lambda T: None if T < 8 else f"T = {T} is not below 8"
)
ANY = dispatch.Implementation("any", lambda T: "any")


def _chosen(implementations, name, T):
    return dispatch.choose("operator", implementations, name, T=T).call(T)


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
        return dispatch.choose("operator", (kernel, plain), name, x=x).call(x)

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
