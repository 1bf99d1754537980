"""A small numerical check of every kernel, forward and backward, against the chunked form.

    python -m kernels_pallas.selfcheck                      all kernels for the device at hand; a
      table for an issue
    python -m kernels_pallas.selfcheck --op=delta_rule      of one operator
    python -m kernels_pallas.selfcheck --interpret          on a CPU, through the interpreters, at
      tiny sizes (minutes)

Exit code 1 if a kernel is wrong or cannot run. `first_use` makes the same checks, one at a time,
before a kernel serves where no implementation was named; what is found here is recorded for it.

Compared are the output and the final state, as computed for inference and for training, and the
gradients of all inputs, under random cotangents. Sizes are those that models use: heads of 128 in
groups, more than one chunk, the last one not whole, an initial state, documents that end inside
chunks. The chunked form (of a convolution the shifted one) gets the same (rounded) inputs in
float32, and products at the highest precision. The error is the suite's: at each position the rms
of the difference over the last axis (arrays of rank below 4: of each entry) over the rms of the
whole tensor; the largest counts, less the largest that writing the truth itself in the result's
dtype makes (a bfloat16 entry of 20 times the rms is off by 4e-2 of it).
"""

import argparse
import dataclasses
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas import dispatch
from kernels_pallas.common.decay import kind as decay_kind
from kernels_pallas.dispatch import absent_tpu, devices, verification
from kernels_pallas.ops.causal_conv import api as causal_conv_api
from kernels_pallas.ops.delta_rule import api as delta_rule_api
from kernels_pallas.ops.diagonal_scan import api as diagonal_scan_api
from kernels_pallas.ops.linear_attention import api as linear_attention_api
from kernels_pallas.ops.softmax_attention import api as softmax_attention_api

# Wide enough for a device's own exp and for a few roundings of the dtype; a kernel that is wrong
# is off by more than 0.1.
BOUND = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2}


class Sizes(NamedTuple):
    B: int = 1
    T: int = 300  # two chunks even of 256, three of 128
    G: int = 1
    H: int = 2
    K: int = 128
    V: int = 128
    D: int = 256


FULL, TINY = Sizes(), Sizes(T=40, K=16, V=16, D=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a check has to know about an operator.

    implementations: all of the operator's.
    variants: the kinds of call whose kernels differ, beside the inputs' dtype.
    kind: of a call's normalised arguments, as `dispatch.choose` gets them, (variant, dtype).
    inputs: (rng, sizes, variant, dtype) -> what is differentiated, by name.
    call: (inputs, variant, segment ids, implementation) -> the outputs, by name.
    packed: whether a variant is called with segment ids.
    float16: the kernels that take it, beside float32 and bfloat16.
    truth: the implementation to compare with.
    """

    implementations: tuple[dispatch.Implementation, ...]
    variants: tuple[str, ...]
    kind: Callable[..., tuple[str, str]]
    inputs: Callable[[np.random.Generator, Sizes, str, str], dict]
    call: Callable[[dict, str, Any, str], dict]
    packed: Callable[[str], bool] = lambda variant: False
    float16: tuple[str, ...] = ()
    truth: str = "chunked"


class Result(NamedTuple):
    """forward, gradient: the largest errors, None where nothing was computed. problem: what is
    wrong, or None.
    raised: an exception stood in the way; refused: the implementation does not support this kind of
      call."""

    operator: str
    implementation: str
    variant: str
    dtype: str
    forward: float | None
    gradient: float | None
    seconds: float
    problem: str | None
    raised: bool = False
    refused: bool = False


def check(operator: str, implementation: str, variant: str, dtype: str, sizes=FULL) -> Result:
    """Runs one check on this process's first device. What goes wrong is in the result; nothing
    raises."""
    start = time.perf_counter()
    call = (operator, implementation, variant, dtype)
    try:
        forward, gradient = _errors(*call, sizes)
    except Exception as error:  # whatever a compiler or a driver may raise
        text = (str(error).strip().splitlines() or ["no message"])[0]
        problem = f"{type(error).__name__}: {text[:300]}"
        refused = isinstance(error, NotImplementedError)
        return Result(*call, None, None, time.perf_counter() - start, problem, True, refused)
    bad = {name: e for name, e in (forward | gradient).items() if not e < BOUND[dtype]}
    problem = None
    if bad:
        worst = max(bad, key=bad.get)
        problem = f"{worst} is off by {bad[worst]:.2g} of its rms, more than {BOUND[dtype]:g}"
        others = [name for name in bad if name != worst]
        problem += f" (and so: {', '.join(others)})" if others else ""
    largest = max(forward.values()), max(gradient.values())
    return Result(*call, *largest, time.perf_counter() - start, problem)


def _errors(operator, implementation, variant, dtype, sizes) -> tuple[dict, dict]:
    """Errors of outputs and of gradients, by name."""
    case = CASES[operator]
    rng = np.random.default_rng(zlib.crc32(f"{operator} {variant}".encode()))
    device = jax.local_devices()[0]
    with jax.default_device(device), jax.transfer_guard("allow"), jax.debug_nans(False):
        inputs = case.inputs(rng, sizes, variant, dtype)
        ids_BT = _documents(sizes) if case.packed(variant) else None
        wide = {name: x.astype(np.promote_types(x.dtype, np.float32)) for name, x in inputs.items()}

        def everything(name):
            def run(inputs, cotangents, ids_BT):
                def call(inputs):
                    return case.call(inputs, variant, ids_BT, name)

                outputs, vjp = jax.vjp(call, inputs)
                given = jax.tree.map(lambda x, d: d.astype(x.dtype), outputs, cotangents)
                return call(inputs), outputs, vjp(given)[0]

            return jax.jit(run)

        # Rounded as the outputs are: division by a small norm multiplies what rounding takes from
        # them.
        shapes = jax.eval_shape(lambda x: case.call(x, variant, ids_BT, case.truth), inputs)
        cotangents = {name: _normal(rng, x.shape, x.dtype) for name, x in shapes.items()}
        with jax.default_matmul_precision("highest"):
            true, _, true_gradients = everything(case.truth)(wide, cotangents, ids_BT)
        inference, training, gradients = everything(implementation)(inputs, cotangents, ids_BT)
        forward = {
            name: max(position_error(x[name], true[name]) for x in (inference, training))
            for name in true
        }
        backward = {
            f"the gradient of {name}": position_error(gradients[name], x)
            for name, x in true_gradients.items()
        }
    return forward, backward


def position_error(got, expected) -> float:
    """See the top of the file; infinite where the shape differs, or a value is not finite."""
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


def _normal(rng, shape, dtype=np.float32):
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def _documents(sizes) -> np.ndarray:
    """Three documents; the second spans most chunk edges, the third has the first's id."""
    T = np.arange(sizes.T)
    ids_T = 1 + ((T >= sizes.T // 4) & (T < sizes.T - sizes.T // 10))
    return np.tile(ids_T.astype(np.int32), (sizes.B, 1))


def _log_decay(rng, shape) -> np.ndarray:
    """From hardly any to nothing left, and now and then exactly nothing."""
    log_decay = -np.exp(rng.uniform(np.log(1e-3), np.log(3), shape))
    return np.where(rng.uniform(size=shape) < 0.01, -np.inf, log_decay).astype(np.float32)


def _matrix_inputs(rng, sizes, variant, dtype):
    B, T, G, H, K, V, _ = sizes
    q, k, v = (_normal(rng, shape) for shape in ((B, T, G, K), (B, T, G, K), (B, T, H, V)))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    inputs = {"q": q, "k": k, "v": v} | {"initial state": _normal(rng, (B, H, K, V)) / K**0.5}
    if variant != "none":
        inputs["log_decay"] = _log_decay(
            rng, {"per_token": (B, T, H), "per_channel": (B, T, H, K)}[variant]
        )
    narrow = {name: inputs[name].astype(jnp.dtype(dtype)) for name in "qkv"}
    return inputs | narrow


def _delta_rule_inputs(rng, sizes, variant, dtype):
    beta_BTH = rng.uniform(0, 2, (sizes.B, sizes.T, sizes.H)).astype(np.float32)
    return _matrix_inputs(rng, sizes, variant, dtype) | {"beta": beta_BTH}


def _matrix_kind(*, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, **others):
    """A document's start is a decay to nothing, so documents without a decay are of kind
    'per_token'."""
    variant = decay_kind(log_decay_BTHK, segment_ids=segment_ids_BT)
    return variant, _dtype(q_BTGK, k_BTGK, v_BTHV)


def _dtype(*arrays) -> str:
    """The dtype of the case that takes the kernel's path of these inputs."""
    dtypes = {str(x.dtype) for x in arrays}
    if "float32" in dtypes:
        return "float32"
    return "bfloat16" if dtypes == {"bfloat16"} else "float16"


def _linear_attention(x, variant, ids_BT, implementation):
    output, final = kernels_pallas.linear_attention(
        *(x["q"], x["k"], x["v"], x.get("log_decay")),
        initial_state=x["initial state"],
        segment_ids=ids_BT,
        implementation=implementation,
    )
    return {"output": output, "final state": final}


def _delta_rule(x, variant, ids_BT, implementation):
    output, final = kernels_pallas.delta_rule(
        *(x["q"], x["k"], x["v"], x["beta"], x.get("log_decay")),
        initial_state=x["initial state"],
        segment_ids=ids_BT,
        implementation=implementation,
    )
    return {"output": output, "final state": final}


def _scan_inputs(rng, sizes, variant, dtype):
    B, T, D = sizes.B, sizes.T, sizes.D
    decay = np.exp(_log_decay(rng, (B, T, D)))
    if variant == "real":
        x = _normal(rng, (B, T, D)).astype(jnp.dtype(dtype))
        return {"x": x, "decay": decay, "initial state": _normal(rng, (B, D))}
    turn = np.exp(1j * rng.uniform(0, np.pi, (B, T, D)))
    x, initial = (_normal(rng, shape, np.complex64) for shape in ((B, T, D), (B, D)))
    return {"x": x, "decay": (decay * turn).astype(np.complex64), "initial state": initial}


def _scan_kind(*, x_BTD, decay_BTD, **others):
    if jnp.iscomplexobj(decay_BTD):
        return "complex", "float32"
    return "real", "bfloat16" if x_BTD.dtype == jnp.bfloat16 else "float32"


def _scan(x, variant, ids_BT, implementation):
    """Both directions; documents are decays of 0, which are among the decays."""
    outputs = {}
    for way, reverse in (("", False), (" in reverse", True)):
        outputs[f"output{way}"], outputs[f"final state{way}"] = kernels_pallas.diagonal_scan(
            *(x["x"], x["decay"]),
            initial_state=x["initial state"],
            reverse=reverse,
            implementation=implementation,
        )
    return outputs


def _attention_inputs(rng, sizes, variant, dtype):
    B, T, G, H, K, V, _ = sizes
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    return {name: _normal(rng, shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def _attention_kind(*, q, v, visibility):
    variant = "causal" if visibility.causal else "full"
    variant += "" if visibility.window is None else " window"
    variant += "" if visibility.q_segment_BT is None else " packed"
    return variant, _dtype(q, v)


def _attention(x, variant, ids_BT, implementation):
    output = kernels_pallas.softmax_attention(
        *(x["q"], x["k"], x["v"]),
        causal=variant.startswith("causal"),
        window=x["q"].shape[1] // 3 if "window" in variant else None,
        segment_ids=ids_BT,
        implementation=implementation,
    )
    return {"output": output}


def _conv_inputs(rng, sizes, variant, dtype):
    B, T, D = sizes.B, sizes.T, sizes.D
    shapes = {"x": (B, T, D), "w": (4, D), "bias": (D,), "initial state": (B, 3, D)}
    if "norm" in variant:  # of its own, lest two gradients are rounded, and their sum once more
        shapes["x of narrow heads"] = (B, T, D)
    return {name: _normal(rng, shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def _conv_kind(*, x_BTD, start_BT, finish, **others):
    kinds = [finish.activation, finish.heads and "norm", None if start_BT is None else "packed"]
    narrow = x_BTD.dtype == jnp.bfloat16
    return " ".join(filter(None, kinds)) or "sums", "bfloat16" if narrow else "float32"


def _conv(x, variant, ids_BT, implementation):
    """With a norm, heads of 128 channels and of 64: their sums are taken in different ways."""
    outputs = {}
    for way, heads in (("", 2), (" of narrow heads", 4)) if "norm" in variant else (("", None),):
        outputs[f"output{way}"], outputs[f"final state{way}"] = kernels_pallas.causal_conv(
            *(x[f"x{way}"], x["w"]),
            bias=x["bias"],
            activation="silu" if "silu" in variant else None,
            l2_norm_heads=heads,
            initial_state=x["initial state"],
            segment_ids=ids_BT,
            implementation=implementation,
        )
    return outputs


_DECAYS = ("none", "per_token", "per_channel")
CASES = {
    "linear_attention": Case(
        *(linear_attention_api.IMPLEMENTATIONS, _DECAYS, _matrix_kind),
        *(_matrix_inputs, _linear_attention),
        packed=lambda variant: variant != "none",
        float16=("triton",),
    ),
    "delta_rule": Case(
        *(delta_rule_api.IMPLEMENTATIONS, _DECAYS, _matrix_kind),
        *(_delta_rule_inputs, _delta_rule),
        packed=lambda variant: variant != "none",
        float16=("triton",),
    ),
    "diagonal_scan": Case(
        *(diagonal_scan_api.IMPLEMENTATIONS, ("real", "complex"), _scan_kind),
        *(_scan_inputs, _scan),
    ),
    "softmax_attention": Case(
        softmax_attention_api.IMPLEMENTATIONS,
        tuple(
            a + b + c for a in ("causal", "full") for b in ("", " window") for c in ("", " packed")
        ),
        *(_attention_kind, _attention_inputs, _attention),
        packed=lambda variant: variant.endswith("packed"),
        float16=("cudnn",),
    ),
    "causal_conv": Case(
        causal_conv_api.IMPLEMENTATIONS,
        (
            *("sums", "silu", "norm", "silu norm"),
            *("packed", "silu packed", "norm packed", "silu norm packed"),
        ),
        *(_conv_kind, _conv_inputs, _conv),
        packed=lambda variant: variant.endswith("packed"),
        truth="shifted",
    ),
}


def kernels(operator: str, platforms) -> list[tuple[str, str, str]]:
    """(implementation, variant, dtype) of every check of an operator's kernels for the platforms."""
    case = CASES[operator]
    return [
        (implementation.name, variant, dtype)
        for implementation in case.implementations
        if implementation.platform in platforms
        for variant in case.variants
        for dtype in _dtypes(case, implementation.name, variant)
    ]


def _dtypes(case, implementation, variant):
    if variant == "complex":
        return ("float32",)
    more = ("float16",) if implementation in case.float16 else ()
    return "bfloat16", "float32", *more


def line(result: Result) -> str:
    """A row of the table that `main` prints."""
    call = f"{result.operator:18} {result.implementation:11} {result.variant:20} {result.dtype:9}"
    errors = ("       -" if x is None else f"{x:8.1e}" for x in (result.forward, result.gradient))
    verdict = "ok" if result.problem is None else "not run" if result.refused else "WRONG"
    text = f"{call} {' '.join(errors)}  {BOUND[result.dtype]:7.0e} {result.seconds:8.1f}  {verdict}"
    return text if result.problem is None else f"{text}: {result.problem}"


HEADING = (
    f"{'operator':18} {'kernel':11} {'case':20} {'dtype':9} {'forward':>8} {'gradient':>8}  {'bound':>7} "
    f"{'seconds':>8}"
)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.selfcheck")
    parser.add_argument("--op", choices=CASES, help="one operator; default: all")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU: run the kernels interpreted, at tiny sizes",
    )
    options = parser.parse_args(arguments)
    absent_tpu.pass_over()
    try:
        target = devices.current()
    except RuntimeError as error:  # JAX_PLATFORMS names what is not there
        parser.error(str(error))
    interpret = options.interpret and target.platform == "cpu"
    platforms = ("tpu", "gpu") if interpret else (target.platform,)
    found = {name: x for each in platforms for name, x in verification.versions(each).items()}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"{target.kind} ({target.platform}), {listed}, Python {platform.python_version()}")
    operators = CASES if options.op is None else (options.op,)
    checks = [(name, *call) for name in operators for call in kernels(name, platforms)]
    if not checks:
        print(f"no operator has a kernel for {target.platform}; --interpret runs those of others")
        return 0
    print(HEADING)
    wrong = False
    for call in checks:
        with devices.interpreted(interpret):
            result = check(*call, TINY if interpret else FULL)
        print(line(result), flush=True)
        wrong |= result.problem is not None and not result.refused
        if not interpret:
            verification.record(verification.record_key(target, *call), result)
    return int(wrong)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it, quietly
    sys.exit(main())
