"""Reading a compiled program's text: what runs how often, what it multiplies and moves, and what
devices tell each other.

XLA's own `cost_analysis` counts the body of a loop once, and nothing of a Pallas kernel. Here a
loop's body counts as often as it runs: the compiler's `known_trip_count`, or what going round with
the counter alone gives (`planning.loops`).
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.planning import loops

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # the others say theirs: f32, s8, c64
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0])
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """operands: names, of the same computation. attributes: what follows the operands."""

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The result's arrays; a tuple has several."""
        return arrays(self.result)

    @property
    def called(self) -> list[str]:
        """Computations that this one runs; of a loop, its body."""
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += re.findall(r"[\w.\-]+", branches[1])
        return names

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^}}]*\}})*\}}|[^,\s]+)", self.attributes)
        return found and found[1]


class Visit(NamedTuple):
    """times: in one run of the program. fused: inside a fusion, where it moves nothing itself."""

    instruction: Instruction
    computation: str
    times: int
    fused: bool


def arrays(result: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(n.strip("<=")) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(result)
    ]


class Program:
    """A module's computations: name -> instructions in the order they run in."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, str] = {}
        self._trips: dict[str, int | None] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header[2]
                current = self.computations[name] = []
                if header[1]:
                    self.entry = name
            elif head := _HEAD.match(line):
                current.append(_instruction(head[2], line[head.end() :]))
                if head[1]:
                    self.roots[name] = head[2]

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        return {
            name: {instruction.name: instruction for instruction in body}
            for name, body in self.computations.items()
        }

    def trips(self, loop: Instruction, computation: str) -> int:
        """How often the body of a `while` runs; once, and it is noted in `unknown_loops`, where the
        text does not say."""
        if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(known[1])
        if loop.name not in self._trips:
            self._trips[loop.name] = loops.trips(self, loop, computation)
        return self._trips[loop.name] or 1

    @property
    def unknown_loops(self) -> list[str]:
        """Of those that were asked for."""
        return [name for name, trips in self._trips.items() if trips is None]

    def visits(self) -> Iterator[Visit]:
        """Everything that runs, inside out of every loop, call, branch (all of them) and fusion."""
        yield from self._visits(self.entry, 1, False)

    def within(self, fusion: str) -> Iterator[Visit]:
        """What a fused computation does, once."""
        yield from self._visits(fusion, 1, True)

    def _visits(self, computation: str, times: int, fused: bool) -> Iterator[Visit]:
        for instruction in self.computations[computation]:
            yield Visit(instruction, computation, times, fused)
            if instruction.operation in _NOT_ENTERED:
                continue
            loop = instruction.operation == "while"
            inner = times * (self.trips(instruction, computation) if loop else 1)
            for name in instruction.called:
                within = fused or instruction.operation == "fusion"
                yield from self._visits(name, inner, within)


# What an async operation runs, its start says; what a reduction applies is one element's work.
_NOT_ENTERED = {
    "async-update", "async-done", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter",
    "all-reduce", "all-reduce-start", "reduce-scatter",
}  # fmt: skip


def _instruction(name: str, text: str) -> Instruction:
    """Of `type operation(operands), attributes`, where a type may be a tuple and operands carry
    types."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    operation, closing = rest[:opening], _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    attributes = inside if operation in ("constant", "parameter") else rest[closing + 1 :]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(
        r"([A-Za-z_][\w.\-]*)(?:,|$)", inside
    )
    return Instruction(name, result, operation, tuple(operands), attributes)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return opening + found.start()
    raise ValueError(f"unbalanced: {text[opening : opening + 80]!r}")


def flops(program: Program, visit: Visit) -> int:
    """Multiplications and additions of a dot or a convolution, once; 0 for anything else."""
    instruction, operation = visit.instruction, visit.instruction.operation
    if operation not in ("dot", "convolution"):
        return 0
    known = program.by_name[visit.computation]
    left, right = (known[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if operation == "dot":
        summed = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in summed)
    return _convolution_flops(instruction, left, right, out)


def _convolution_flops(instruction: Instruction, left, right, out) -> int:
    """Positions of the window that meet padding, or holes of a dilation, multiply nothing and are
    not counted."""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    window = instruction.attribute("window") or ""
    fields = dict(re.findall(r"(\w+)=([\d_x\-]+)", window))
    spatial = sorted(label for label in rhs_labels if label.isdigit())

    def of(field, index, default):
        return fields[field].split("x")[index] if field in fields else default

    total = (
        2 * out[out_labels.index("b")] * out[out_labels.index("f")] * right[rhs_labels.index("i")]
    )
    for index, label in enumerate(spatial):
        low = int(of("pad", index, "0_0").split("_")[0])
        total *= _met(
            left[lhs_labels.index(label)], right[rhs_labels.index(label)], out[out_labels.index(label)],
            low, *(int(of(f, index, "1")) for f in ("stride", "lhs_dilate", "rhs_dilate")),
        )  # fmt: skip
    return total // int(instruction.attribute("batch_group_count") or 1)


@functools.cache
def _met(
    size: int, window: int, outputs: int, low: int, stride: int, holes: int, spread: int
) -> int:
    """How many (output, window position) pairs of one dimension fall on an element."""
    (few, few_step), (many, many_step) = sorted([(outputs, stride), (window, spread)])
    at_many = np.arange(many) * many_step - low
    met = 0
    for i in range(few):
        at = at_many + i * few_step
        met += int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())
    return met
