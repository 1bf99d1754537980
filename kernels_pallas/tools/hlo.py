"""A reader of compiled programs' HLO text: what runs, how often, and which arrays it touches.

    module = hlo.HloModule(executable.as_text())
    for visit in module.visits():               # every instruction, in loops and fusions too
        visit.times, visit.instruction.operation, visit.instruction.arrays

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as often as it runs: by
the compiler's `known_trip_count`, or by carrying out the scalar instructions between the loop's
counters and its test. Those are few, but a counter may start anywhere, step by more than one where
the compiler unrolled, and be compared as u32 or s32.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # others say theirs: f32, s8, c64
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# The start of an asynchronous operation names what it runs; a reduction applies its computation to
# single elements.
_NOT_ENTERED = {
    "async-update", "async-done", "reduce", "reduce-window", "scatter", "sort", "map",
    "select-and-scatter", "all-reduce", "all-reduce-start", "reduce-scatter",
}  # fmt: skip


class Array(NamedTuple):
    """Fields of an array type in HLO text, such as "bf16[8,128]{1,0:S(1)}".

    space: number of the memory that holds the array: 0 is HBM and, on a TPU, 1 is VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        digits = re.findall(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0])
        return math.prod(self.shape) * bits // 8

    @property
    def in_hbm(self) -> bool:
        return self.space == 0


class Instruction(NamedTuple):
    """Fields of one HLO instruction, `name = result operation(operands), attributes`.

    result: the text of its result's type. operands: names of instructions in the same computation.
    attributes: the text after the operands; for a constant its value, for a parameter its number.
    """

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """Returns the array types of the instruction's result: one, or a tuple's several."""
        return [
            Array(
                dtype,
                tuple(int(n.strip("<=")) for n in shape.split(",") if n),
                int(space[1]) if (space := re.search(r"S\((\d+)", layout)) else 0,
            )
            for dtype, shape, layout in _ARRAY.findall(self.result)
        ]

    @property
    def called(self) -> list[str]:
        """Returns the names of the computations that the instruction runs.

        Those of a loop are its body, not its condition; those of a conditional, its branches.
        """
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += re.findall(r"[\w.\-]+", branches[1])
        return names

    @property
    def is_kernel(self) -> bool:
        """Returns whether the instruction calls a Pallas TPU kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def estimated_cycles(self) -> int | None:
        """Returns the compiler's estimate of the instruction's cycles, or None if it made none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> Any:
        """Returns the text of the attribute `name`, or None if the instruction lacks it."""
        found = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^}}]*\}})*\}}|[^,\s]+)", self.attributes)
        return found and found[1]


class Visit(NamedTuple):
    """Fields of one instruction that a program runs.

    computation: name of the computation that holds it. times: how often it runs.
    fused: whether it lies inside a fusion, where it moves no data between memories itself.
    """

    instruction: Instruction
    computation: str
    times: int
    fused: bool


class HloModule:
    """Compiled program, parsed from its HLO text.

    computations: the instructions of each computation, in order, by the computation's name.
    roots: the name of the instruction that gives each computation's result.
    entry: the name of the computation that the program starts with.
    """

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

    def root(self, computation: str) -> Instruction:
        return self.by_name[computation][self.roots[computation]]

    def operands(self, instruction: Instruction, computation: str) -> list[Instruction]:
        known = self.by_name[computation]
        return [known[name] for name in instruction.operands if name in known]

    def trips(self, loop: Instruction, computation: str) -> int:
        """Returns how often the body of a `while` instruction runs.

        Returns 1 where that cannot be determined; the loop is then listed in `unknown_loops`.
        computation: name of the computation that holds the loop.
        """
        if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(known[1])
        if loop.name not in self._trips:
            self._trips[loop.name] = _counted_trips(self, loop, computation)
        return self._trips[loop.name] or 1

    @property
    def unknown_loops(self) -> list[str]:
        """Returns the names of loops whose iterations `trips` could not determine."""
        return [name for name, trips in self._trips.items() if trips is None]

    def visits(self) -> Iterator[Visit]:
        """Yields a `Visit` for every instruction that runs, in loops, calls and fusions too.

        Every branch of a conditional counts as taken.
        """
        yield from self._visits(self.entry, 1, False)

    def within(self, fusion: str) -> Iterator[Visit]:
        """Yields a `Visit`, run once, for each instruction of the fused computation `fusion`."""
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


def _instruction(name: str, text: str) -> Instruction:
    """Parses the HLO text `type operation(operands), attributes` into an Instruction. The type may
    be a tuple, and each operand may have its type in front."""
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


def flops(module: HloModule, visit: Visit) -> int:
    """Returns the FLOPs of one execution of a dot or convolution, 0 for any other operation."""
    instruction, operation = visit.instruction, visit.instruction.operation
    if operation not in ("dot", "convolution"):
        return 0
    left, right = (x.arrays[0].shape for x in module.operands(instruction, visit.computation)[:2])
    out = instruction.arrays[0].shape
    if operation == "dot":
        summed = _numbers(instruction.attribute("lhs_contracting_dims") or "")
        return 2 * math.prod(out) * math.prod(left[i] for i in summed)
    return _convolution_flops(instruction, left, right, out)


def _convolution_flops(instruction: Instruction, left, right, out) -> int:
    """Counts a convolution's FLOPs, leaving out products with padding or a dilation's zeros. left,
    right, out: shapes of the input, the filter and the result."""
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
        total *= _window_hits(
            left[lhs_labels.index(label)], right[rhs_labels.index(label)],
            out[out_labels.index(label)], low,
            *(int(of(f, index, "1")) for f in ("stride", "lhs_dilate", "rhs_dilate")),
        )  # fmt: skip
    return total // int(instruction.attribute("batch_group_count") or 1)


@functools.cache
def _window_hits(
    size: int, window: int, outputs: int, low: int, stride: int, holes: int, spread: int
) -> int:
    """Counts the pairs (output, window position) along one dimension that read an input element.

    low: padding before the first element. holes, spread: dilation of the input and of the window.
    """
    (few, few_step), (many, many_step) = sorted([(outputs, stride), (window, spread)])
    at_many = np.arange(many) * many_step - low
    hits = 0
    for i in range(few):
        at = at_many + i * few_step
        hits += int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())
    return hits


def groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """Returns a collective's groups of devices; for a permute, its (source, target) pairs.

    Devices are numbers in the program's order, `devices` in all: one group if the text names none.
    XLA writes groups as lists, as a shape that numbers fill (transposed where it says so), or as
    axes of its own mesh.
    """
    if pairs := instruction.attribute("source_target_pairs"):
        numbers = _numbers(pairs)
        return [p for p in zip(numbers[::2], numbers[1::2]) if p[0] != p[1]] or [(0,)]
    text = instruction.attributes
    if named := re.search(
        rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}", text
    ):
        axes, shape, order, along = named.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        ids = _iota(_numbers(shape) if shape else [*sizes.values()], order)
        return _along(ids.reshape([*sizes.values()]), list(sizes), along)
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        shape, of, order = iota.groups()
        ids = _iota(_numbers(of), order).reshape(_numbers(shape))
        return [tuple(map(int, group)) for group in ids]
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    found = re.findall(r"\{([\d,]+)\}", lists[1] if lists else "")
    return [tuple(_numbers(group)) for group in found] or [tuple(range(devices))]


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(shape: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _along(ids: np.ndarray, names: list[str], along: str) -> list[tuple[int, ...]]:
    """Returns the groups of devices that lie along some axes of a mesh.

    ids: device numbers in the mesh's shape. names: the mesh's axes.
    along: HLO text of the axes; 'x':(2)4 is the factor 4 of an axis x of size 2 * 4 * rest.
    """
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", along):
        i = names.index(name)
        split = (int(before), int(size), ids.shape[i] // (int(before) * int(size)))
        ids = ids.reshape(ids.shape[:i] + split + ids.shape[i + 1 :])
        names[i : i + 1] = [f"{name} before", name, f"{name} after"]
    moved = [names.index(name) for name in re.findall(r"'([^']+)'", along)]
    ids = np.moveaxis(ids, moved, range(-len(moved), 0))
    size = int(np.prod(ids.shape[-len(moved) :]))
    return [tuple(map(int, group)) for group in ids.reshape(-1, size)]


_MOST_TRIPS = 1_000_000
_BINARY = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "minimum": min,
    "maximum": max, "and": operator.and_, "or": operator.or_,
}  # fmt: skip
_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
    "NE": operator.ne,
}  # fmt: skip
_SAME = {"copy", "bitcast", "convert", "reshape"}


class _Unknown(Exception):
    """Raised where a value depends on more than constants and loop counters."""


def _counted_trips(module: HloModule, loop: Instruction, computation: str) -> int | None:
    """Counts a `while` loop's iterations by its counters; None if these depend on data."""
    condition, body = ((loop.attribute(name) or "").lstrip("%") for name in ("condition", "body"))
    counters: dict[int, int] = {}  # by their index in the loop's tuple, those that matter

    def outside(_):
        raise _Unknown

    def element(where: str, of: Instruction, index: int, counter: Callable) -> int:
        if of.operation != "tuple":
            raise _Unknown
        return _value(module, where, of.operands[index], counter)

    def now(index: int) -> int:
        if index not in counters:
            (start,) = module.operands(loop, computation)
            counters[index] = element(computation, start, index, outside)
        return counters[index]

    try:
        for rounds in range(_MOST_TRIPS):
            if not _value(module, condition, module.roots[condition], now):
                return rounds
            known = -1
            while known != len(counters):  # the next value of one may need another
                known = len(counters)
                later = {i: element(body, module.root(body), i, now) for i in list(counters)}
            counters.update(later)
    except _Unknown:
        pass
    return None


def _value(module: HloModule, computation: str, name: str, element: Callable[[int], int]) -> int:
    """Evaluates the scalar instruction `name`; raises _Unknown where it depends on data. element:
    returns, by index, an element of the loop's tuple or an operand of the fusion."""
    instruction = module.by_name[computation][name]
    operation, attributes = instruction.operation, instruction.attributes
    if operation == "constant" and re.fullmatch(r"-?\d+|true|false", attributes):
        return {"true": 1, "false": 0}[attributes] if attributes.isalpha() else int(attributes)
    if operation == "get-tuple-element":
        if module.operands(instruction, computation)[0].operation == "parameter":
            return element(int(instruction.attribute("index")))
        raise _Unknown
    if operation == "parameter":  # of a fusion
        return element(int(attributes))

    def operand(i: int) -> int:
        return _value(module, computation, instruction.operands[i], element)

    if operation in _SAME:
        return operand(0)
    if operation in _BINARY:
        return _BINARY[operation](operand(0), operand(1))
    if operation == "compare":
        return _COMPARE[instruction.attribute("direction")](operand(0), operand(1))
    if operation in ("fusion", "call"):
        (inner,) = instruction.called
        return _value(module, inner, module.roots[inner], operand)
    raise _Unknown
