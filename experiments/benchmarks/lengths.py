"""Whole-document linear attention against softmax attention over length, for `bench lengths`.

Times and memory of both come from one run, in which all programs take turns. A second part reads a
long sequence block by block, each block seeing itself and all earlier ones, and records what has to
be held between blocks.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from experiments.benchmarks import correctness, timing
from experiments.benchmarks.entries import Arrays, BenchmarkEntry, Problem, jax_entry
from experiments.benchmarks.report import Row
from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import Shape

PASSES = ("forward", "forward_backward")
LINEAR, SOFTMAX = "linear attention", "softmax attention"
DENSE = "softmax attention, all weights held"  # compiled for its memory, not timed


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    rounds, seconds: see `timing.interleaved`. check_length: T of the problem that both are checked
      on. blocks, block_size: of the stream.
    """

    shape: Shape = Shape(B=1, H=4, K=32, V=32)
    lengths: tuple[int, ...] = tuple(2**n for n in range(6, 15))
    dtype: str = "float32"
    rounds: int = 15
    seconds: float = 2.0
    check_length: int = 300
    blocks: int = 64
    block_size: int = 256


def _linear(implementation) -> Callable[[Arrays], Arrays]:
    def call(inputs):
        o_BTHV, _ = kernels_pallas.document_sums(
            inputs["q"], inputs["k"], inputs["v"], implementation=implementation
        )
        return {"output": o_BTHV}

    return call


def _softmax(implementation) -> Callable[[Arrays], Arrays]:
    def call(inputs):
        q, k, v = (inputs[name] for name in "qkv")
        attend = kernels_pallas.softmax_attention
        return {"output": attend(q, k, v, causal=False, implementation=implementation)}

    return call


FORMS = {LINEAR: _linear, SOFTMAX: _softmax}


def rows(settings: Settings, log: Callable[[str], None] = print) -> tuple[list[Row], list[Row]]:
    """Checks both operators and times them over T; returns timings and checks.

    An operator whose outputs or gradients are wrong is not timed. Rows of DENSE have planned memory
    alone.
    """
    checks, entries = [], {}
    for name, form in FORMS.items():
        problem = _problem(settings, settings.check_length)
        entries[name] = jax_entry(name, form("chunked"))
        expected = correctness.truth(form("reference"), problem)
        found = correctness.errors(entries[name], problem, expected)
        wrong = correctness.wrong(found, correctness.tolerance(settings.dtype))
        checks.append({"operator": name, "error": max(found.values()), "wrong": wrong})
        log(f"{name}: {wrong or 'right'}, largest error {max(found.values()):.1e}")
    right = {
        check["operator"]: entries[check["operator"]] for check in checks if not check["wrong"]
    }
    found = [row for which in PASSES for row in _timed(settings, right, which, log)]
    return found + [_planned(settings, T) for T in settings.lengths], checks


def _planned(settings, T: int) -> Row:
    """Returns the memory that a compiler plans for softmax attention that holds all its weights."""
    entry, problem = jax_entry(DENSE, _softmax("xla")), _problem(settings, T)
    row = {"operator": DENSE, "pass": "forward_backward", "T": T}
    return row | {"temp_bytes": entry.prepare(problem, True).temp_bytes}


def _timed(settings, entries: dict[str, BenchmarkEntry], which, log) -> list[Row]:
    prepared = {}
    for T in settings.lengths:
        problem = _problem(settings, T)
        for name, entry in entries.items():
            prepared[name, T] = entry.prepare(problem, which == "forward_backward")
    log(f"{which}: timing {len(prepared)} programs in turn")
    calls = {key: one.run for key, one in prepared.items()}
    times = timing.interleaved(
        calls, settings.rounds, settings.seconds, together=lambda key: key[0]
    )
    return [
        {"operator": name, "pass": which, "T": T}
        | times[name, T].row()
        | {"temp_bytes": prepared[name, T].temp_bytes}
        for name, T in prepared
    ]


def stream(settings: Settings) -> tuple[list[Row], float]:
    """Reads a sequence block by block, the state carried from one to the next.

    Returns a row per block with the bytes that are held after it: those of the state, and for
    comparison those of the keys and values that softmax attention holds. The second result is the
    largest error of all outputs against one pass over the whole sequence.
    """
    size, blocks = settings.block_size, settings.blocks
    problem = _problem(settings, size * blocks)
    inputs = {name: jnp.asarray(x) for name, x in problem.inputs.items()}

    @jax.jit
    def read(q, k, v, state):
        return kernels_pallas.document_sums(q, k, v, initial_state=state, block_size=size)

    shape = settings.shape
    state = jnp.zeros((shape.B, shape.H, shape.K, shape.V))
    found, outputs = [], []
    for n in range(blocks):
        block = [inputs[name][:, n * size : (n + 1) * size] for name in "qkv"]
        output, state = read(*block, state)
        outputs.append(output)
        keys_and_values = sum(inputs[name][:, : (n + 1) * size].nbytes for name in "kv")
        tokens = (n + 1) * size
        row = {"blocks": n + 1, "tokens": tokens, "state_bytes": state.nbytes}
        found.append(row | {"keys_and_values_bytes": keys_and_values})
    whole, _ = read(*(inputs[name] for name in "qkv"), jnp.zeros_like(state))
    error = correctness.position_error(jnp.concatenate(outputs, axis=1), whole)
    return found, error


def _problem(settings: Settings, T: int) -> Problem:
    shape, rng = settings.shape, np.random.default_rng(T)
    sizes = {"q": shape.K, "k": shape.K, "v": shape.V}
    inputs = {
        name: regimes.normal(rng, shape.B, T, shape.H, size).astype(jnp.dtype(settings.dtype))
        for name, size in sizes.items()
    }
    return Problem(inputs, {"output": regimes.normal(rng, *inputs["v"].shape)})


def table(found: list[Row]) -> list[Row]:
    """Returns a row per T: times in ms of each operator and pass, their ratio, and memory."""
    at = {(row["operator"], row["pass"], row["T"]): row for row in found}
    lines = []
    for T in dict.fromkeys(row["T"] for row in found):
        line: Row = {"T": T}
        for which, label in zip(PASSES, ("forward", "fwd+bwd")):
            here = {name: at[name, which, T] for name in FORMS if (name, which, T) in at}
            for name, row in here.items():
                line[f"{name}, {label}, ms"] = 1e3 * row["seconds"]
            if len(here) == len(FORMS):
                line[f"softmax/linear, {label}"] = (
                    here[SOFTMAX]["seconds"] / here[LINEAR]["seconds"]
                )
        for name in (*FORMS, DENSE):
            row = at.get((name, "forward_backward", T))
            if row and row["temp_bytes"] is not None:
                line[f"{name}, fwd+bwd, temp MiB"] = row["temp_bytes"] / 2**20
        lines.append(line)
    return lines


def growth(found: list[Row]) -> list[str]:
    """Returns lines that say how times grow: the power of T over the last two lengths."""
    lengths = sorted({row["T"] for row in found})[-2:]
    lines = []
    for name in FORMS:
        for which in PASSES:
            ends = [
                row
                for T in lengths
                for row in found
                if (row["operator"], row["pass"], row["T"]) == (name, which, T)
            ]
            if len(ends) < 2 or len(lengths) < 2:
                continue
            step = np.log(lengths[1] / lengths[0])
            power = np.log(ends[1]["seconds"] / ends[0]["seconds"]) / step
            lines.append(
                f"{name}, {which.replace('_', ' + ')}: time grows as T^{power:.2f} from "
                f"{lengths[0]:,} to {lengths[1]:,} tokens"
            )
    return lines
