"""diagonal_scan: the conformance suite, the reverse direction, and what only this operator
promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import diagonal_scan
from kernels_pallas.common import checks, regimes
from kernels_pallas.dispatch import devices
from kernels_pallas.ops.diagonal_scan import api, step
from kernels_pallas.ops.diagonal_scan.shapes import SHAPES
from kernels_pallas.tools import tpu_bundles, tpu_compile
from tests.kernels_pallas.ops.conformance import (
    TOLERANCE,
    Shape,
    Suite,
    assert_close,
    documents,
    everything,
    inputs_of,
    suite_case,
    truth,
)


def _call(inputs, **keywords):
    return CASE.call(inputs, **keywords)


def _step(token, state):
    decay = jnp.exp(token["log_decay"]) if "log_decay" in token else token["decay"]
    return step(token["x"], decay, state)


def _skip(T, regime):
    """A program takes seconds to compile: all kinds of decay at one length, and one or two at the
    others."""
    kinds = {
        1: ("log",),
        63: ("weak",),
        64: ("complex any sign",),
        128: ("complex log",),
        1000: ("log", "complex weak"),
    }
    return T in kinds and not regime.startswith(kinds[T])


CASE = suite_case(
    api.OPERATOR,
    implementations=("chunked", "naive_chunk", "pallas_tpu"),
    step=_step,
    typical=("weak", "complex weak"),
    fast=(
        *((1, "weak"), (100, "log resets"), (64, "any sign"), (100, "fixed"), (100, "log strong")),
        *((100, "complex log resets"), (100, "growing"), (1000, "complex growing"), (1000, "log")),
    ),
    kernels_skip=_skip,
    fast_kernels=((100, "log resets"),),
    grouped=False,
)


class TestDiagonalScan(Suite):
    case = CASE


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "T, regime",
    [
        (100, "weak"),
        pytest.param(1, "weak", marks=pytest.mark.slow),
        pytest.param(300, "complex weak", marks=pytest.mark.slow),
    ],
)
def test_reverse_is_forward_on_flipped_time(T, regime, packed):
    inputs = inputs_of(CASE, Shape(T=T), regime)
    ids = documents(2, T) if packed else None

    def flipped(inputs, *, implementation, segment_ids):
        inputs = {name: x[:, ::-1] if x.ndim == 3 else x for name, x in inputs.items()}
        ids = None if segment_ids is None else segment_ids[:, ::-1]
        h, final = _call(inputs, implementation=implementation, segment_ids=ids)
        return h[:, ::-1], final

    def reverse(inputs, **keywords):
        return _call(inputs, reverse=True, **keywords)

    expected = truth(dataclasses.replace(CASE, call=flipped), inputs, ids)
    for name in (*CASE.implementations, "reference"):
        with devices.interpreted():
            got = everything(dataclasses.replace(CASE, call=reverse), name, inputs, ids)
        assert_close(got, expected, TOLERANCE["float32"])


def test_gradients_are_those_of_the_definition_by_finite_differences():
    """Against no implementation at all, so a mistaken conjugation cannot hide in the reference."""
    with jax.enable_x64(True):
        inputs = inputs_of(CASE, Shape(T=5, K=2), "complex weak")
        inputs = {name: jnp.asarray(x, jnp.complex128) for name, x in inputs.items()}

        @jax.jit
        def loss(inputs):
            h, final = _call(inputs)
            return jnp.sum(jnp.abs(h - 1j) ** 2) + jnp.sum(jnp.imag(final * (2 + 1j)) ** 2)

        gradient = jax.grad(loss)(inputs)
        for name, x in inputs.items():
            index = (1,) * x.ndim
            for direction in (1.0, 1j):
                ends = [
                    loss({**inputs, name: x.at[index].add(sign * 1e-6 * direction)})
                    for sign in (1, -1)
                ]
                slope = (ends[0] - ends[1]) / 2e-6
                # JAX: the directional derivative is Re(gradient * direction), with no conjugate.
                expected = jnp.real(gradient[name][index] * direction)
                np.testing.assert_allclose(slope, expected, rtol=1e-6, err_msg=name)


def _zeros_in_front(rng, kind, T=300, D=4):
    """Decays above 1 where nothing is there yet, as left padding makes them: their product is
    infinite, the state is not."""
    dtype = np.complex64 if kind == "complex" else np.float32
    x = regimes.normal(rng, 2, T, D, dtype=dtype)
    for row in x:
        row[: rng.integers(T - 20, T)] = 0
    decay = rng.uniform(1.2, 3.0, (2, T, D)) * rng.choice([-1.0, 1.0], (2, T, D))
    if kind == "complex":
        decay = decay * np.exp(2j * np.pi * rng.random((2, T, D)))
    return {"x": x, "decay": decay.astype(x.dtype)}


@pytest.mark.parametrize("kind", ["real", pytest.param("complex", marks=pytest.mark.slow)])
def test_growth_of_nothing_is_nothing(kind):
    rng = np.random.default_rng(0)
    run = jax.jit(
        lambda x, implementation: _call(x, implementation=implementation), static_argnums=1
    )
    for _ in range(5):
        inputs = _zeros_in_front(rng, kind)
        inputs["initial_state"] = np.zeros_like(inputs["x"][:, 0])
        with jax.enable_x64(True):
            wide = {name: z.astype(np.result_type(z, np.float64)) for name, z in inputs.items()}
            expected = _call(wide, implementation="reference")
        for name in CASE.implementations:
            with devices.interpreted():
                got = run(inputs, name)
            names = ("output", "final state")
            assert_close(dict(zip(names, got)), dict(zip(names, expected)), TOLERANCE["float32"])


def test_a_tiny_state_may_grow_by_more_than_float32_holds():
    """1e-30 times 2^200 is 1.6e30, though 2^128 is infinite; and what has shrunk by 1e-45 may grow
    again."""
    decay = np.concatenate([np.full(200, 2.0), np.full(45, 0.1), np.full(45, 10.0)])
    decay = decay.astype(np.float32)[None, :, None]
    start, zeros = np.full((1, 1), 1e-30, np.float32), np.zeros_like(decay)
    h, final = jax.jit(diagonal_scan)(zeros, decay, initial_state=start)
    expected = 1e-30 * np.cumprod(decay.astype(np.float64))
    np.testing.assert_allclose(h[0, :, 0], expected, rtol=2e-5)
    np.testing.assert_allclose(final[0, 0], expected[-1], rtol=2e-5)


@pytest.mark.parametrize("turn", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_near_decay_1_chunks_are_as_exact_as_the_recurrence(turn):
    """The rounding of a chunk's decay adds up over as many chunks as a state lasts."""
    T, sizes = 20_000, np.array([0.9, 0.999, 0.9999, 0.99999, 1.0, -0.99999])
    decay = (sizes * np.exp(1j * turn)).astype(np.complex64) if turn else sizes.astype(np.float32)
    x = np.abs(regimes.normal(np.random.default_rng(0), 1, T, len(sizes))).astype(decay.dtype)
    with jax.enable_x64(True):
        wide = np.result_type(decay, np.float64)
        exact = diagonal_scan(x.astype(wide), decay.astype(wide), implementation="reference")[0]
        exact = np.asarray(exact)
    scale = np.sqrt(np.mean(np.abs(exact) ** 2, axis=1))
    error = {
        name: np.abs(np.asarray(diagonal_scan(x, decay, implementation=name)[0]) - exact).max(
            axis=1
        )
        / scale
        for name in ("chunked", "reference")
    }
    assert (error["chunked"] < 2 * error["reference"]).all(), error


def test_one_condition_for_a_whole_batch_that_vmap_adds():
    """Else both its branches would run for each row, the one token by token too."""
    x = jnp.ones((3, 2, 300, 4))
    row = jax.vmap(lambda x: diagonal_scan(x, jnp.full((4,), 0.5))[0])
    assert " cond[" in str(jax.make_jaxpr(row)(x))
    np.testing.assert_array_equal(row(x)[0], diagonal_scan(x[0], jnp.full((4,), 0.5))[0])
    by_x = jax.vmap(jax.grad(lambda x: diagonal_scan(x, jnp.full((4,), 0.5))[0].sum()))
    assert " cond[" in str(jax.make_jaxpr(by_x)(x))


def test_the_reference_scans_wide_arrays_only():
    """XLA's CPU backend converts a whole narrow one at each token: the time of bfloat16 grew with
    T^2."""
    x = jax.ShapeDtypeStruct((1, 8, 2), jnp.bfloat16)
    program = jax.make_jaxpr(lambda x: diagonal_scan(x, x, implementation="reference"))(x)
    scans = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
    assert scans
    for scan in scans:
        assert {v.aval.dtype for v in (*scan.invars, *scan.outvars)} == {jnp.dtype(jnp.float32)}


def test_minus_infinity_has_no_gradient_and_forgets():
    x = jnp.ones((1, 4, 2))
    log_decay = jnp.full((1, 4, 2), -0.1).at[:, 2].set(-jnp.inf)

    def loss(log_decay, x):
        return diagonal_scan(x, log_decay=log_decay)[0][:, 2:].sum()

    by_log_decay, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(log_decay, x)
    assert (by_log_decay[:, :3] == 0).all()
    assert (by_log_decay[:, 3] > 0).all()
    assert (by_x[:, :2] == 0).all()


def test_output_and_state_dtypes():
    x = jnp.ones((1, 3, 2), jnp.bfloat16)

    def dtypes(function, *arguments):
        return tuple(z.dtype for z in jax.eval_shape(function, *arguments))

    narrow, wide = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert dtypes(diagonal_scan, x, jnp.full((2,), 0.5, jnp.bfloat16)) == (narrow, wide)
    assert dtypes(diagonal_scan, x, jnp.full((2,), 0.5j)) == (jnp.complex64, jnp.complex64)
    assert dtypes(step, x[:, 0], jnp.full((2,), 0.5), jnp.zeros((1, 2))) == (narrow, wide)


def test_the_backward_pass_keeps_the_decay_and_the_states_only():
    """What stays for the backward pass of 1000 tokens: two arrays (B, T, D), not log T of them."""
    x = jax.ShapeDtypeStruct((2, 1000, 8), jnp.float32)
    _, vjp = jax.eval_shape(lambda x, a: jax.vjp(diagonal_scan, x, a), x, x)
    sizes = [leaf.size for leaf in jax.tree.leaves(vjp)]
    assert sum(sizes) <= 2 * x.size + 2 * 8, sizes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda x: ((x,), {}), "exactly one of decay_BTD and log_decay"),
        (lambda x: ((x, x), {"log_decay": x}), "exactly one of decay_BTD and log_decay"),
        (lambda x: ((x[0], x), {}), r"x must be \(B, T, D\); got \(5, 3\)"),
        (lambda x: ((x, x[:, :4]), {}), r"decay_BTD has shape \(2, 4, 3\); expected \(2, 5, 3\)"),
        (lambda x: ((x,), {"log_decay": x[..., :1]}), r"log_decay has shape \(2, 5, 1\)"),
        (lambda x: ((x, x), {"initial_state": x}), r"initial_state has shape .* expected \(2, 3\)"),
        (lambda x: ((x, x), {"segment_ids": x}), r"segment_ids has shape .* expected \(2, 5\)"),
        (lambda x: ((x, x), {"segment_ids": x[..., 0]}), "segment_ids has dtype float32; expected"),
        (lambda x: ((x, x), {"implementation": "fast"}), "'chunked', 'naive_chunk', 'reference'"),
        (lambda x: ((x.astype(int), x), {}), "x must be floating or complex; got int"),
    ],
)
def test_errors_name_what_was_given(arguments, message):
    positional, keywords = arguments(jnp.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match=message):
        diagonal_scan(*positional, **keywords)


@pytest.mark.parametrize("log_decay", [0.5, 0.5 + 1j])
def test_positive_log_decay_is_found_with_checks_on(log_decay):
    x = jnp.zeros((2, 5, 3))
    with checks.enabled(), pytest.raises(ValueError, match="log_decay must be <= 0"):
        diagonal_scan(x, log_decay=jnp.full((3,), log_decay))
    with checks.enabled():
        diagonal_scan(x, log_decay=jnp.full((3,), -log_decay), implementation="reference")


def test_published_workloads_trace():
    for shape in SHAPES.values():
        dtype = jnp.complex64 if shape["complex"] else jnp.float32
        x = jax.ShapeDtypeStruct((shape["B"], shape["T"], shape["D"]), dtype)
        h, final = jax.eval_shape(diagonal_scan, x, x)
        assert h.shape == x.shape and final.shape == (shape["B"], shape["D"])


def _compiled():
    """One in the fast suite; in CI every shape on one part, and the kernels on every part."""
    for name in SHAPES:
        for part in tpu_compile.PARTS:
            marks = [] if (name, part) == ("small", "v6e") else [pytest.mark.slow]
            if name != "small" and part != "v6e":
                marks.append(pytest.mark.exhaustive)
            yield pytest.param(name, part, marks=marks, id=f"{name}-{part}")


@pytest.mark.parametrize("name, part", list(_compiled()))
def test_kernels_compile_for_tpus(name, part):
    """Forward and backward, at published sizes, within the VMEM of the part, without spills, each
    array moved once."""
    shape = SHAPES[name]
    dtype = jnp.complex64 if shape["complex"] else jnp.float32
    x = jax.ShapeDtypeStruct((shape["B"], shape["T"], shape["D"]), dtype)
    state = jax.ShapeDtypeStruct((shape["B"], shape["D"]), dtype)

    def both(x, decay, state, g, g_final):
        def scan(*arguments):
            x, decay, state = arguments
            return diagonal_scan(x, decay, initial_state=state, implementation="pallas_tpu")

        outputs, vjp = jax.vjp(scan, x, decay, state)
        return outputs, vjp((g, g_final))

    program = tpu_bundles.measure(part, both, x, x, state, x, state)
    assert [kernel.name for kernel in program.kernels] == [
        "diagonal_scan_backward",
        "diagonal_scan_forward",
    ]
    for kernel in program.kernels:
        assert 0 < kernel.vmem_bytes < tpu_compile.PARTS[part].vmem_bytes
        assert kernel.spills == 0
        assert kernel.hbm_bytes <= 1.3 * kernel.least_hbm_bytes


def test_the_tpu_kernel_says_what_it_does_not_take():
    with jax.enable_x64(True), devices.interpreted():
        x = jnp.zeros((1, 5, 3), jnp.float64)
        with pytest.raises(NotImplementedError, match="x is float64; it takes float32, bfloat16"):
            diagonal_scan(x, x, implementation="pallas_tpu")
    x = jnp.zeros((1, 5, 3))
    with pytest.raises(NotImplementedError, match="it is a kernel for tpu; this is cpu"):
        diagonal_scan(x, x, implementation="pallas_tpu")
