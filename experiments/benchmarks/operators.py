"""The operators as the benchmarks call them: published shapes, kinds of call, inputs."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.entries import Arrays, BenchmarkEntry, Problem, jax_entry
from kernels_pallas import dispatch
from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import Shape
from kernels_pallas.ops.causal_conv import api as causal_conv
from kernels_pallas.ops.causal_conv import shapes as causal_conv_shapes
from kernels_pallas.ops.delta_rule import api as delta_rule
from kernels_pallas.ops.delta_rule import shapes as delta_rule_shapes
from kernels_pallas.ops.diagonal_scan import api as diagonal_scan
from kernels_pallas.ops.diagonal_scan import shapes as diagonal_scan_shapes
from kernels_pallas.ops.document_sums import api as document_sums
from kernels_pallas.ops.document_sums import shapes as document_sums_shapes
from kernels_pallas.ops.linear_attention import api as linear_attention
from kernels_pallas.ops.linear_attention import shapes as linear_attention_shapes
from kernels_pallas.ops.softmax_attention import api as softmax_attention
from kernels_pallas.ops.softmax_attention import shapes as softmax_attention_shapes

DECAYS = ("none", "per_head", "per_token", "per_channel")
DEFINITION = "reference"  # the recurrent form: truth, and what ratios refer to
_DOCUMENT = 1000  # tokens


@dataclasses.dataclass(frozen=True)
class OperatorBenchmark:
    """How an operator is benchmarked: on which kinds of call, shapes and inputs (regime "trained").

    kinds: {variant, the name in tables and flags: kind of call in the operator's case}; each is
      timed separately. A shape that names no variant has the first.
    published: the module with the operator's published shapes.
    """

    operator: dispatch.Operator
    kinds: dict[str, str]
    published: Any

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    @property
    def rounded(self) -> tuple[str, ...]:
        return self.operator.case.rounded

    @property
    def letters(self) -> str:
        return self.operator.case.letters

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(implementation.name for implementation in self.operator.implementations)

    @property
    def shapes(self) -> dict[str, dict[str, Any]]:
        """Returns {name: sizes} of the operator's published workloads."""
        return self.published.SHAPES

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Returns {letter: size} of the operator's dimensions, such as K, defaults filled in."""
        known = dataclasses.asdict(shape) | {"G": shape.key_heads, "D": shape.width}
        names = [*self.letters, *(["window"] if "window" in self.variants else [])]
        return {name: known[name] for name in names}

    def make_inputs(self, rng: np.random.Generator, shape: Shape, T: int, variant: str) -> Arrays:
        shape = dataclasses.replace(shape, T=T)
        if variant == "per_head":  # a number for each head, from the law that tokens have
            fixed = {"log_decay": regimes.gate(rng, (shape.H,), "trained")}
            return self.operator.case.inputs(rng, shape, "none trained") | fixed
        return self.operator.case.inputs(rng, shape, f"{self.kinds[variant]} trained")

    def function(
        self, implementation: str, variant: str, shape: Shape
    ) -> Callable[[Arrays], Arrays]:
        """Returns an implementation as a function from a dict of inputs to a dict of outputs."""
        kind, case = self.kinds[variant], self.operator.case
        options = case.options(kind, shape) | {"implementation": implementation}

        def call(inputs):
            if "packed" in kind:
                B, T = inputs[case.positional[0]].shape[:2]
                ids_BT = jnp.broadcast_to(jnp.arange(T)[None] // _DOCUMENT, (B, T))
                return case.call(self.operator.function, inputs, segment_ids=ids_BT, **options)
            return case.call(self.operator.function, inputs, **options)

        return call

    def entry(self, implementation: str, variant: str, shape: Shape) -> BenchmarkEntry:
        return jax_entry(implementation, self.function(implementation, variant, shape))


def _same(*kinds: str) -> dict[str, str]:
    return dict(zip(kinds, kinds))


CASES = {
    case.name: case
    for case in (
        OperatorBenchmark(linear_attention.OPERATOR, _same(*DECAYS), linear_attention_shapes),
        OperatorBenchmark(delta_rule.OPERATOR, _same(*DECAYS), delta_rule_shapes),
        OperatorBenchmark(diagonal_scan.OPERATOR, _same("real", "complex"), diagonal_scan_shapes),
        OperatorBenchmark(
            document_sums.OPERATOR,
            {"row": "row", "blocks": "blocks of 1024", "packed": "packed"},
            document_sums_shapes,
        ),
        OperatorBenchmark(
            softmax_attention.OPERATOR,
            {"full": "causal", "window": "causal window"},
            softmax_attention_shapes,
        ),
        OperatorBenchmark(
            causal_conv.OPERATOR,
            {"short": "sums", **_same("silu", "silu norm", "silu norm packed")},
            causal_conv_shapes,
        ),
    )
}


def published(case: OperatorBenchmark, name: str) -> tuple[Shape, int, str]:
    """Returns (sizes, T, variant) of a published shape; raises ValueError for an unknown one."""
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
    if sizes.pop("block_size", None):
        variant = "blocks"
    if sizes.get("window"):
        variant = "window"
    if "K" in sizes:
        sizes.setdefault("V", sizes["K"])
    return Shape(**{k: v for k, v in sizes.items() if v is not None}), length, variant


def make_problem(
    case: OperatorBenchmark, shape: Shape, T: int, variant: str, dtype: str
) -> Problem:
    """Returns an operator's inputs of T tokens and random cotangents, equal for equal arguments."""
    seed = zlib.crc32(repr((case.name, variant, dataclasses.astuple(shape), T)).encode())
    rng = np.random.default_rng(seed)
    inputs = case.make_inputs(rng, shape, T, variant)
    if variant != "complex":
        inputs |= {name: inputs[name].astype(jnp.dtype(dtype)) for name in case.rounded}
    outputs = jax.eval_shape(case.function(DEFINITION, variant, shape), inputs)
    cotangents = jax.tree.map(lambda y: regimes.normal(rng, *y.shape, dtype=y.dtype), outputs)
    return Problem(inputs, cotangents)
