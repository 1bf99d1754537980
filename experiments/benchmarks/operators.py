"""The five operators as cases: sizes, variants, inputs, and how each is called."""

import dataclasses
import importlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from experiments.benchmarks.entries import Arrays, Entry, Problem, jax_entry

DECAYS = ("none", "per_head", "per_token", "per_channel")
DEFINITION = "reference"  # the recurrent form: truth, and what ratios refer to


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a problem beside its length. G: key heads (None is H). D: width where there are no
    heads (None is H V).
    I: taps of a convolution."""

    B: int = 1
    H: int = 4
    G: int | None = None
    K: int = 64
    V: int = 64
    D: int | None = None
    I: int = 4
    window: int = 256

    @property
    def key_heads(self) -> int:
        return self.G or self.H

    @property
    def width(self) -> int:
        return self.D or self.H * self.V


@dataclasses.dataclass(frozen=True)
class OperatorCase:
    """What the benchmark has to know about an operator.

    variants: the forms that are timed each on its own; the first is a shape's, unless it says
      another.
    make_inputs: (rng, shape, T, variant) -> float32 (complex64) arrays by name.
    call: (inputs, implementation, variant, shape) -> outputs by name.
    rounded: the inputs that take the dtype asked for; the others (states, gates) stay float32.
    letters: the sizes it has.
    """

    name: str
    variants: tuple[str, ...]
    make_inputs: Callable[[np.random.Generator, Shape, int, str], Arrays]
    call: Callable[[Arrays, str, str, Shape], Arrays]
    rounded: tuple[str, ...]
    letters: str

    def sizes(self, shape: Shape) -> dict[str, int]:
        """What of a shape makes a difference here, defaults filled in."""
        known = dataclasses.asdict(shape) | {"G": shape.key_heads, "D": shape.width}
        names = [*self.letters, *(["window"] if "window" in self.variants else [])]
        return {name: known[name] for name in names}

    @property
    def implementations(self) -> tuple[str, ...]:
        api = importlib.import_module(f"kernels_pallas.ops.{self.name}.api")
        return tuple(implementation.name for implementation in api.IMPLEMENTATIONS)

    @property
    def shapes(self) -> dict[str, dict[str, Any]]:
        """Published workloads by name."""
        return importlib.import_module(f"kernels_pallas.ops.{self.name}.shapes").SHAPES

    def function(
        self, implementation: str, variant: str, shape: Shape
    ) -> Callable[[Arrays], Arrays]:
        return lambda inputs: self.call(inputs, implementation, variant, shape)

    def entry(self, implementation: str, variant: str, shape: Shape) -> Entry:
        return jax_entry(implementation, self.function(implementation, variant, shape))


def _normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _qkv(rng, shape: Shape, T: int) -> Arrays:
    B, G, K = shape.B, shape.key_heads, shape.K
    return {
        "q": _normal(rng, B, T, G, K),
        "k": _normal(rng, B, T, G, K) / np.float32(K**0.5),
        "v": _normal(rng, B, T, shape.H, shape.V),
    }


def _decay(rng, shape: Shape, T: int, decay: str) -> Arrays:
    """Log decays as trained models have them: half-lives from a few tokens to a few thousand."""
    B, H, K = shape.B, shape.H, shape.K
    size = {"per_head": (H,), "per_token": (B, T, H), "per_channel": (B, T, H, K)}.get(decay)
    if size is None:
        return {}
    return {"log_decay": -np.exp(rng.uniform(np.log(3e-4), np.log(0.3), size)).astype(np.float32)}


def _linear_attention_inputs(rng, shape, T, decay):
    initial_state = _normal(rng, shape.B, shape.H, shape.K, shape.V)
    return (
        _qkv(rng, shape, T)
        | _decay(rng, shape, T, decay)
        | {"initial_state": initial_state / np.float32(shape.K**0.5)}
    )


def _delta_rule_inputs(rng, shape, T, decay):
    inputs = _linear_attention_inputs(rng, shape, T, decay)
    k = inputs["k"]
    inputs["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    inputs["beta"] = rng.uniform(0, 1, (shape.B, T, shape.H)).astype(np.float32)
    return inputs


def _diagonal_scan_inputs(rng, shape, T, variant):
    B, D = shape.B, shape.width
    magnitude = rng.uniform(0.5, 0.999, (B, T, D)).astype(np.float32)
    if variant == "real":
        return {"x": _normal(rng, B, T, D), "decay": magnitude, "initial_state": _normal(rng, B, D)}
    angle = rng.uniform(0, np.pi, (B, T, D)).astype(np.float32)
    return {
        "x": _normal(rng, B, T, D) + 1j * _normal(rng, B, T, D),
        "decay": magnitude * np.exp(1j * angle),
        "initial_state": _normal(rng, B, D) + 1j * _normal(rng, B, D),
    }


def _softmax_attention_inputs(rng, shape, T, variant):
    B, G = shape.B, shape.key_heads
    return {
        "q": _normal(rng, B, T, shape.H, shape.K),
        "k": _normal(rng, B, T, G, shape.K),
        "v": _normal(rng, B, T, G, shape.V),
    }


def _causal_conv_inputs(rng, shape, T, variant):
    B, D, I = shape.B, shape.width, shape.I
    return {
        "x": _normal(rng, B, T, D),
        "w": _normal(rng, I, D),
        "bias": _normal(rng, D),
        "initial_state": _normal(rng, B, I - 1, D),
    }


def _outputs(results) -> Arrays:
    return dict(zip(("output", "final state"), results))


def _linear_attention(x, implementation, decay, shape):
    return _outputs(
        kernels_pallas.linear_attention(
            x["q"], x["k"], x["v"], x.get("log_decay"),
            initial_state=x["initial_state"], implementation=implementation,
        )
    )  # fmt: skip


def _delta_rule(x, implementation, decay, shape):
    return _outputs(
        kernels_pallas.delta_rule(
            x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"),
            initial_state=x["initial_state"], implementation=implementation,
        )
    )  # fmt: skip


def _diagonal_scan(x, implementation, variant, shape):
    return _outputs(
        kernels_pallas.diagonal_scan(
            x["x"], x["decay"], initial_state=x["initial_state"], implementation=implementation
        )
    )


def _softmax_attention(x, implementation, variant, shape):
    window = shape.window if variant == "window" else None
    o_BTHV = kernels_pallas.softmax_attention(
        x["q"], x["k"], x["v"], window=window, implementation=implementation
    )
    return {"output": o_BTHV}


def _causal_conv(x, implementation, variant, shape):
    """Documents are 1000 tokens long, heads shape.V channels wide."""
    B, T, _ = x["x"].shape
    ids_BT = jnp.broadcast_to(jnp.arange(T)[None] // 1000, (B, T)) if "packed" in variant else None
    return _outputs(
        kernels_pallas.causal_conv(
            x["x"],
            x["w"],
            bias=x["bias"],
            activation="silu" if "silu" in variant else None,
            l2_norm_heads=shape.width // shape.V if "norm" in variant else None,
            initial_state=x["initial_state"],
            segment_ids=ids_BT,
            implementation=implementation,
        )
    )


CASES = {
    case.name: case
    for case in (
        OperatorCase(
            name="linear_attention",
            variants=DECAYS,
            make_inputs=_linear_attention_inputs,
            call=_linear_attention,
            rounded=("q", "k", "v"),
            letters="BHGKV",
        ),
        OperatorCase(
            name="delta_rule",
            variants=DECAYS,
            make_inputs=_delta_rule_inputs,
            call=_delta_rule,
            rounded=("q", "k", "v"),
            letters="BHGKV",
        ),
        OperatorCase(
            name="diagonal_scan",
            variants=("real", "complex"),
            make_inputs=_diagonal_scan_inputs,
            call=_diagonal_scan,
            rounded=("x",),
            letters="BD",
        ),
        OperatorCase(
            name="softmax_attention",
            variants=("full", "window"),
            make_inputs=_softmax_attention_inputs,
            call=_softmax_attention,
            rounded=("q", "k", "v"),
            letters="BHGKV",
        ),
        OperatorCase(
            name="causal_conv",
            variants=("short", "silu", "silu norm", "silu norm packed"),
            make_inputs=_causal_conv_inputs,
            call=_causal_conv,
            rounded=("x", "w", "bias", "initial_state"),
            letters="BDVI",
        ),
    )
}


def published(case: OperatorCase, name: str) -> tuple[Shape, int, str]:
    """The shape called `name`, its length and its variant. Raises ValueError, listing the choices."""
    if name not in case.shapes:
        raise ValueError(
            f"{case.name} has no shape {name!r}; choose one of {', '.join(case.shapes)}"
        )
    sizes = dict(case.shapes[name])
    length, variant = sizes.pop("T"), case.variants[0]
    if "decay" in sizes:
        variant = sizes.pop("decay")
    if sizes.pop("complex", False):
        variant = "complex"
    if sizes.get("window"):
        variant = "window"
    return Shape(**{k: v for k, v in sizes.items() if v is not None}), length, variant


def make_problem(case: OperatorCase, shape: Shape, T: int, variant: str, dtype: str) -> Problem:
    """Inputs and random cotangents, the same ones for the same arguments."""
    rng = np.random.default_rng(zlib.crc32(repr((case.name, variant, shape, T)).encode()))
    inputs = case.make_inputs(rng, shape, T, variant)
    if variant != "complex":
        inputs |= {name: inputs[name].astype(jnp.dtype(dtype)) for name in case.rounded}
    outputs = jax.eval_shape(case.function(DEFINITION, variant, shape), inputs)

    def cotangent(output):
        x = _normal(rng, *output.shape)
        if jnp.issubdtype(output.dtype, jnp.complexfloating):
            x = x + 1j * _normal(rng, *output.shape)
        return x.astype(output.dtype)

    return Problem(inputs, jax.tree.map(cotangent, outputs))
