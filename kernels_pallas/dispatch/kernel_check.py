"""The numerical check of a kernel, forward and backward, against a reference implementation.

It compares the output and the final state, as computed for inference and for training, and the
gradients of all inputs, under random cotangents. Sizes are those that models use: heads of 128 in
groups, more than one chunk, the last one not whole, an initial state, documents that end inside
chunks. The reference is the chunked form (of a convolution the shifted one), on the same (rounded)
inputs in float32, with products at the highest precision. The error at a position is the rms of the
difference over the last axis (arrays of rank below 4: of one entry) over the rms of the whole
tensor, as in the conformance suite. The largest counts, less the largest that rounding the
reference to the result's dtype makes (a bfloat16 entry of 20 times the rms is off by 4e-2 of it).
"""

import time
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.dispatch.case import Shape

# Wide enough for a device's own exp and for a few roundings of the dtype; a kernel that is wrong
# is off by more than 0.1.
BOUND = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2}
# T 300: two chunks even of 256, three of 128.
FULL = Shape(B=1, T=300, G=1, H=2, K=128, V=128, D=256, window=100)
TINY = Shape(B=1, T=40, G=1, H=2, K=16, V=16, D=32, window=13)


class CheckResult(NamedTuple):
    """Result of one check of a kernel.

    forward, gradient: the largest errors, None where nothing was computed. problem: what is wrong,
      or None. raised: whether an exception stopped the check. refused: whether that was because the
      implementation does not support this kind of call.
    """

    operator: str
    implementation: str
    kind: str
    dtype: str
    forward: float | None
    gradient: float | None
    seconds: float
    problem: str | None
    raised: bool = False
    refused: bool = False


def check(operator, implementation: str, kind: str, dtype: str, shape=FULL) -> CheckResult:
    """Runs one check of an implementation of a `dispatch.Operator`, on this process's first device.

    kind and dtype say which of the operator's kinds of call is checked. Exceptions are not raised,
    but described in the result.
    """
    start = time.perf_counter()
    call = (operator.name, implementation, kind, dtype)
    try:
        forward, gradient = _errors(operator, implementation, kind, dtype, shape)
    except Exception as error:  # whatever a compiler or a driver may raise
        text = (str(error).strip().splitlines() or ["no message"])[0]
        problem = f"{type(error).__name__}: {text[:300]}"
        refused = isinstance(error, NotImplementedError)
        seconds = time.perf_counter() - start
        return CheckResult(*call, None, None, seconds, problem, True, refused)
    bad = {name: e for name, e in (forward | gradient).items() if not e < BOUND[dtype]}
    problem = None
    if bad:
        worst = max(bad, key=lambda name: bad[name])
        problem = f"{worst} is off by {bad[worst]:.2g} of its rms, more than {BOUND[dtype]:g}"
        others = [name for name in bad if name != worst]
        problem += f" (and so: {', '.join(others)})" if others else ""
    largest = max(forward.values()), max(gradient.values())
    return CheckResult(*call, *largest, time.perf_counter() - start, problem)


def _errors(operator, implementation, kind, dtype, shape) -> tuple[dict, dict]:
    """Returns two dicts by name: the errors of outputs and states, and those of gradients."""
    case = operator.case
    rng = np.random.default_rng(zlib.crc32(f"{operator.name} {kind}".encode()))
    device = jax.local_devices()[0]
    options = case.options(kind, shape)
    calls = {"": options} | {
        suffix: options | more for suffix, more in case.further_calls(kind, shape).items()
    }
    with jax.default_device(device), jax.transfer_guard("allow"), jax.debug_nans(False):
        inputs = case.inputs(rng, shape, f"{kind} check")
        if kind != "complex":
            inputs |= {name: inputs[name].astype(jnp.dtype(dtype)) for name in case.rounded}
        ids_BT = _documents(shape) if case.packed(kind) else None

        def everything(name):
            """Returns (run, forward) for the implementation `name`.

            forward: (inputs by suffix, ids) -> outputs by the suffixes of `further_calls`.
            run: jitted (inputs, cotangents, ids) -> outputs in inference, outputs in training, and
              gradients.
            """

            def forward(given, ids_BT):
                return {
                    suffix: case.call(
                        operator.function,
                        given[suffix],
                        segment_ids=ids_BT,
                        implementation=name,
                        **keywords,
                    )
                    for suffix, keywords in calls.items()
                }

            def run(inputs, cotangents, ids_BT):
                # Each call has inputs of its own, so that no gradient is a sum over two calls.
                given = dict.fromkeys(calls, inputs)
                outputs, vjp = jax.vjp(lambda given: forward(given, ids_BT), given)
                narrow = jax.tree.map(lambda x, d: d.astype(x.dtype), outputs, cotangents)
                return forward(given, ids_BT), outputs, vjp(narrow)[0]

            return jax.jit(run), forward

        # Cotangents are rounded as the outputs are: division by a small norm multiplies what
        # rounding takes from them.
        truth, plain = everything(case.truth)
        shapes = jax.eval_shape(plain, dict.fromkeys(calls, inputs), ids_BT)
        cotangents = jax.tree.map(lambda x: _normal(rng, x), shapes)
        wide = {name: x.astype(np.promote_types(x.dtype, np.float32)) for name, x in inputs.items()}
        with jax.default_matmul_precision("highest"):
            true, _, true_gradients = truth(wide, cotangents, ids_BT)
        kernel, _ = everything(implementation)
        inference, training, gradients = kernel(inputs, cotangents, ids_BT)
        forward = {
            f"{name}{suffix}": max(
                position_error(x[suffix][name], one) for x in (inference, training)
            )
            for suffix, outputs in true.items()
            for name, one in outputs.items()
        }
        backward = {
            f"the gradient of {name}{suffix}": position_error(gradients[suffix][name], one)
            for suffix, given in true_gradients.items()
            for name, one in given.items()
        }
    return forward, backward


def position_error(got, expected) -> float:
    """Returns the largest error of `got` at a position, in units of the rms of `expected`.

    The module's docstring defines it. It is inf for another shape or values that are not finite.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return np.inf
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    written = expected.astype(got.dtype).astype(wide)
    got, expected = got.astype(wide), expected.astype(wide)
    if not np.isfinite(got).all():
        return np.inf

    def largest(x):
        square = np.abs(x - expected) ** 2
        return np.sqrt((square.mean(axis=-1) if square.ndim >= 4 else square).max())

    error = max(0.0, largest(got) - largest(written))
    scale = np.sqrt(np.mean(np.abs(expected) ** 2))
    if scale == 0:
        return 0.0 if error == 0 else np.inf
    return float(error / scale)


def _normal(rng, like):
    x = rng.standard_normal(like.shape)
    if np.issubdtype(like.dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(like.shape)
    return x.astype(like.dtype)


def _documents(shape) -> np.ndarray:
    """Returns segment ids (B, T) of three documents in each row.

    The second contains most chunk edges; the third has the id of the first.
    """
    T = np.arange(shape.T)
    ids_T = 1 + ((T >= shape.T // 4) & (T < shape.T - shape.T // 10))
    return np.tile(ids_T.astype(np.int32), (shape.B, 1))
