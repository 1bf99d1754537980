"""Programs to time: a BenchmarkEntry turns inputs into a compiled call. `jax_entry` makes ours; a
peer library defines its own."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs and a cotangent for each output, by name: NumPy arrays in the dtypes to be timed."""

    inputs: Arrays
    cotangents: Arrays


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled call on fixed arrays, ready to be timed.

    run: makes the call, and returns when its results are computed: the outputs by name and, if
      prepared with backward, "gradient of <input>" for every input.
    temp_bytes: memory beside inputs and outputs, as the compiler plans it, if it says.
    total_bytes: temp_bytes with inputs and outputs.
    """

    run: Callable[[], Arrays]
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    total_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkEntry:
    """A named way to compute a problem: one of our implementations, or another library's.

    prepare: (problem, backward) -> Prepared; raises NotImplementedError, with the reason, for a
      problem that it cannot compute.
    """

    name: str
    prepare: Callable[[Problem, bool], Prepared]


def with_gradients(call: Callable[[Arrays], Arrays]) -> Callable[[Arrays, Arrays], Arrays]:
    """Returns (inputs, cotangents) -> call(inputs), with "gradient of <input>" for each input."""

    def run(inputs, cotangents):
        outputs, vjp = jax.vjp(call, inputs)
        (gradients,) = vjp(cotangents)
        return outputs | {f"gradient of {name}": x for name, x in gradients.items()}

    return run


def jax_entry(name: str, call: Callable[[Arrays], Arrays]) -> BenchmarkEntry:
    """Returns a benchmark entry that compiles and runs `call`, a JAX function from dict to dict."""

    def prepare(problem: Problem, backward: bool) -> Prepared:
        function = with_gradients(call) if backward else call
        given = (problem.inputs, problem.cotangents) if backward else (problem.inputs,)
        arguments = jax.device_put(given)
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        temp, total = _planned_bytes(compiled)
        return Prepared(lambda: jax.block_until_ready(compiled(*arguments)), seconds, temp, total)

    return BenchmarkEntry(name, prepare)


def _planned_bytes(compiled) -> tuple[int | None, int | None]:
    plan = compiled.memory_analysis()
    if plan is None:
        return None, None
    arrays = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.temp_size_in_bytes, plan.temp_size_in_bytes + arrays
