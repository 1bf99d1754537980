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
    """Inputs by name, and a cotangent for each output: NumPy arrays in the dtypes that are
    timed."""

    inputs: Arrays
    cotangents: Arrays


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed.

    run: makes one call on arrays that are where they have to be, and returns when its results are
      there. Forward, they are the outputs by name; with backward, also "gradient of <input>" for
      every input.
    temp_bytes: memory beside inputs and outputs, as the compiler plans it; None where it does not
      say.
    total_bytes: temp_bytes with inputs and outputs.
    """

    run: Callable[[], Arrays]
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    total_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkEntry:
    """A named way to compute a problem.

    name: the one in tables. prepare: (problem, backward) -> Prepared; raises NotImplementedError,
    saying why, for a problem that it cannot do.
    """

    name: str
    prepare: Callable[[Problem, bool], Prepared]


def with_gradients(call: Callable[[Arrays], Arrays]) -> Callable[[Arrays, Arrays], Arrays]:
    """Returns a function (inputs, cotangents) -> outputs of call(inputs), and the gradient of every
    input by name."""

    def run(inputs, cotangents):
        outputs, vjp = jax.vjp(call, inputs)
        (gradients,) = vjp(cotangents)
        return outputs | {f"gradient of {name}": x for name, x in gradients.items()}

    return run


def jax_entry(name: str, call: Callable[[Arrays], Arrays]) -> BenchmarkEntry:
    """Returns the entry of a function from a dict of inputs to a dict of outputs, compiled ahead of
    time for the default device."""

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
