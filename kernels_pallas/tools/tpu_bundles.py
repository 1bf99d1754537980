"""What a TPU kernel costs as compiled: static cycles, slots in use, spills, VMEM, HBM traffic.
Nothing is run.

    from kernels_pallas import tpu_bundles

    program = tpu_bundles.measure("v6e", function, *shapes)     # as `tpu_compile.compile_for`
    for kernel in program.kernels: print(kernel)
    program.cycles / tokens                                     # kernels and XLA's own operations

A TPU core issues one VLIW bundle a cycle where nothing stalls. The compiler's listing has every
bundle with the depth of its loop; a bundle counts as often as its loops go round, a branch
(`pl.when`) as if always taken. So `cycles` has no waiting for HBM in it, and no stall: it is a
figure to compare kernels with, of the order of a nanosecond each on a v6e.

Kernels are told apart by `pallas_call(name=...)`: give each its own.
"""

import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from kernels_pallas.tools import tpu_compile


class Kernel(NamedTuple):
    """One pallas_call. Shares and counts are of the grid loop's body, inner loops counted as often
    as they go round.

    grid: and steps, its product, of which each core takes its part.
    bundles: in the grid loop's body, each once. step_cycles: with inner loops gone round. cycles:
      of the whole grid, on one core (v5p has two, and splits parallel axes between them).
    mxu_share: of the cycles, those that issue to a matrix unit. load_share, store_share: of the
      vector load and store slots.
    spills, fills: vector registers put to memory and taken back, a step. spill_share: of the
      kernel's bundles, those that go where the compiler packs it without them.
    hbm_bytes: blocks moved, a block again each time its index changes; None where the kernel moves
      data itself.
    least_hbm_bytes: every operand and result once.
    """

    name: str
    grid: tuple[int, ...]
    steps: int
    bundles: int
    step_cycles: int
    cycles: int
    mxu_share: float
    load_share: float
    store_share: float
    spills: int
    fills: int
    spill_share: float
    vmem_bytes: int
    hbm_bytes: int | None
    least_hbm_bytes: int


class Program(NamedTuple):
    """xla_cycles: the compiler's own estimates for the operations outside kernels, those in loops
    as often as they go round. unestimated_bytes: what operations move for which it estimates
    nothing, such as a change of layout; they are not in xla_cycles. hbm_bytes: blocks that kernels
    move, and operands and results of XLA's operations, as far as they lie in HBM; None where there
    are loops. least_hbm_bytes: arguments and results of the program once."""

    compiled: tpu_compile.Compiled
    kernels: list[Kernel]
    xla_cycles: int
    unestimated_bytes: int
    hbm_bytes: int | None
    least_hbm_bytes: int

    @property
    def cycles(self) -> int:
        return self.xla_cycles + sum(kernel.cycles for kernel in self.kernels)


class Loops(NamedTuple):
    """A listing in figures: for each bundle, whether it is in the grid loop's body, and how often a
    pass goes over it."""

    in_grid: np.ndarray
    times: np.ndarray
    grid_trips: int


def measure(topology: str, function, *arguments) -> Program:
    """Compiles `function(*arguments)` as `tpu_compile.compile_for` and reads what the compiler
    left."""
    compiled = tpu_compile.compile_for(topology, function, *arguments)
    with tpu_compile.tracing_for(topology):
        calls = list(pallas_calls(jax.jit(function).trace(*arguments).jaxpr.jaxpr))
    kernels = []
    for instruction, listing in compiled.listings.items():
        call = _call_of(instruction, calls)
        grid = call.params["grid_mapping"].grid
        kernels.append(_kernel(str(call.params["name"]), grid, call, listing))
    kernels.sort(key=lambda kernel: kernel.name)
    traffic = xla_bytes(compiled.hlo)
    if traffic is not None:
        traffic += sum(kernel.hbm_bytes or kernel.least_hbm_bytes for kernel in kernels)
    memory = compiled.memory
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Program(
        compiled,
        kernels,
        xla_cycles(compiled.hlo),
        unestimated_bytes(compiled.hlo),
        traffic,
        least,
    )


def _kernel(name: str, grid, call, listing: tpu_compile.Listing) -> Kernel:
    steps = math.prod(grid)
    loops = read_loops(listing.bundles, steps)
    capacity, used = read_utilization(listing.utilization)
    times = np.where(loops.in_grid, loops.times, 0)
    step_cycles = int(times.sum())
    count = {unit: int((times * used[unit]).sum()) for unit in used}
    outside = int(np.where(loops.in_grid, 0, loops.times).sum())
    least, moved = _traffic(call)
    return Kernel(
        name=name,
        grid=tuple(grid),
        steps=steps,
        bundles=int(loops.in_grid.sum()),
        step_cycles=step_cycles,
        cycles=outside + loops.grid_trips * step_cycles,
        mxu_share=float((times * (used["MXU"] > 0)).sum() / step_cycles),
        load_share=count["VLOAD"] / (capacity["VLOAD"] * step_cycles),
        store_share=count["VSTORE"] / (capacity["VSTORE"] * step_cycles),
        spills=count["VSTORE:SPILL"],
        fills=count["VLOAD:FILL"],
        spill_share=listing.spill_bundles / len(loops.times),
        vmem_bytes=listing.vmem_bytes,
        hbm_bytes=moved,
        least_hbm_bytes=least,
    )


_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:LH|LB|LE|PB|PF|CT)? *: *>* *\{", re.MULTILINE)
_BACK = re.compile(r"sbr\.rel \(!%(\w+)\) target = \$region(\d+)")
_DELAY_SLOTS = 4  # bundles after a branch that are issued whichever way it goes


def read_loops(bundles: str, steps: int) -> Loops:
    """Reads a `final_bundles` listing, of a kernel whose grid has `steps` steps.

    A loop reaches from the bundle that starts a region to the branch back to it. It goes round as
    often as its exit test says: to a limit, from 0, by the step of the tested counter; once where
    the limit is no constant. The grid loop's counter runs a little past the steps, to fill and
    drain the pipeline; those rounds skip the body and do not count. A grid of one step has no loop:
    all of it is the body.
    """
    starts = [match.start() for match in _BUNDLE.finditer(bundles)]
    texts = [bundles[i:j] for i, j in zip(starts, [*starts[1:], len(bundles)])]
    times = np.ones(len(texts), int)
    in_grid = np.full(len(texts), steps == 1)
    grid_trips = steps
    for last, text in enumerate(texts):
        for predicate, region in _BACK.findall(text):
            begins = re.compile(rf"Start (?:/End empty )?region {region}\b")
            first = next((i for i in range(last + 1) if begins.search(texts[i])), None)
            if first is None:  # a branch forward
                continue
            body = slice(first, last + 1 + _DELAY_SLOTS)
            trips = _trips(bundles, predicate)
            if steps > 1 and "iteration index" in texts[first]:
                in_grid[body] = True
                # two cores share the grid of a v5p: then the counter's limit is below its steps
                grid_trips = min(steps, trips - 2) if trips and trips > 2 else steps
            else:
                times[body] *= trips or 1
    return Loops(in_grid, times, grid_trips)


def _trips(bundles: str, predicate: str) -> int | None:
    test = re.search(
        rf"%{predicate} = scmp\.ge\.s32\.totalorder (?:\([^)]*\), )?%(\w+), (\d+) /\* loop exit test",
        bundles,
    )
    if test is None:
        return None
    counter, limit = test.groups()
    step = re.search(rf"%{counter} = sadd\.s32 (\d+),", bundles)
    return -(-int(limit) // (int(step[1]) if step else 1))


def read_utilization(text: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Reads a `final_hlo-static-per-bundle-utilization` listing: slots of each unit, and their use
    bundle by bundle."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split())))
    rows = np.array([line.split() for line in lines[4:] if line.strip()], int)
    return capacity, {name: rows[:, i] for i, name in enumerate(names)}


def pallas_calls(jaxpr):
    """The equations of a jaxpr, and of those inside it, that are Pallas kernels."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from pallas_calls(inner)


def _call_of(instruction: str, calls) -> Any:
    """The pallas_call that became this instruction: 'name.1', or 'jvp_name_.1' under a
    transformation."""
    name = re.sub(r"\.\d+$", "", instruction).rstrip("_")
    endings = [re.sub(r"\W", "_", str(call.params["name"])) for call in calls]
    named = [c for c, e in zip(calls, endings) if name == e or name.endswith(f"_{e}")]
    longest = max((len(str(call.params["name"])) for call in named), default=0)
    named = [call for call in named if len(str(call.params["name"])) == longest]
    shapes = {(call.params["grid_mapping"].grid, str(call.params["out_avals"])) for call in named}
    if len(shapes) != 1:
        known = sorted({str(call.params["name"]) for call in calls})
        raise ValueError(
            f"kernel {instruction!r} of the compiled program is {len(shapes)} different pallas_calls; give each a name= of "
            f"its own (there are {', '.join(known)})"
        )
    return named[0]


def _traffic(call) -> tuple[int, int | None]:
    """(every operand and result once, blocks as often as they move or None)."""
    mapping = call.params["grid_mapping"]
    arrays = [v.aval for v in (*call.invars, *call.outvars)]
    least = sum(array.size * array.dtype.itemsize for array in arrays)
    points = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32)
    moved = 0
    for block in mapping.block_mappings:
        array, kept = block.array_aval, block.transformed_block_aval
        whole = array.size * array.dtype.itemsize
        index_map = block.index_map_jaxpr
        if str(kept).startswith("Ref<any>") or str(kept).startswith("Ref<hbm>"):
            return least, None
        if len(index_map.jaxpr.invars) != len(mapping.grid) or not mapping.grid:
            moved += whole
            continue
        index = jax.vmap(jaxpr_as_fun(index_map))(*points.T)
        index = np.stack([np.broadcast_to(i, len(points)) for i in index], 1)
        fetches = 1 + int((index[1:] != index[:-1]).any(1).sum())
        moved += min(fetches * math.prod(kept.shape) * array.dtype.itemsize, fetches * whole)
    return least, moved


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")


def trip_counts(hlo: str) -> dict[str, int]:
    """How often each `while` body of an optimised program runs: to the constant that its condition
    compares with, from 0 by 1, as `lax.scan` and `fori_loop` count; once where there is none."""
    limits, name = {}, None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
        elif limit := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            limits[name] = int(limit[1])
    loops = re.findall(r" while\([^\n]*condition=%?([\w.\-]+), body=%?([\w.\-]+)", hlo)
    return {body: limits.get(condition, 1) for condition, body in loops}


def xla_cycles(hlo: str) -> int:
    """The sum of the compiler's `estimated_cycles` over the program, loop bodies as often as they
    run."""
    trips = trip_counts(hlo)
    cycles: dict[str, int] = {}
    called: dict[str, list[str]] = {}
    name = entry = None
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
            cycles[name], called[name] = 0, []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles[name] += int(estimate[1])
            else:
                called[name] += _CALLED.findall(line)

    def total(name):
        return trips.get(name, 1) * (cycles[name] + sum(map(total, called[name])))

    return total(entry)


_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # the others say their bits: f32, s8
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def xla_bytes(hlo: str) -> int | None:
    """What operations outside kernels read and write in HBM, each operand and result whole; None
    with a loop. Of a slice it is what is taken, and of an update in place what is put.

    Less what kernels find in VMEM, or leave there, since their own count takes all operands to be
    in HBM.
    """
    if trip_counts(hlo):
        return None
    total = 0
    for shape, operation, sources, _ in _operations(hlo):
        if operation == "kernel":
            total -= sum(_bytes(x, in_hbm=False) for x in (shape, *sources))
        elif operation.endswith(
            "-start"
        ):  # a copy of what it writes, all of the operand or a slice
            written = re.sub(
                r"^\(\(.*?\), ", "", shape
            )  # a slice's result begins with its operands
            written = _SHAPE.search(written)[0]
            size = _bytes(written, in_hbm=True) or _bytes(written, in_hbm=False)
            total += _bytes(written, in_hbm=True)
            total += min(size, sum(_bytes(x, in_hbm=True) for x in sources))
        else:
            total += sum(_bytes(x, in_hbm=True) for x in _moved(shape, operation, sources))
    return total


def _moved(shape, operation, sources) -> tuple[str, ...]:
    """The arrays that an operation reads and writes."""
    if operation == "slice":
        return shape, shape
    if (
        operation == "dynamic-update-slice"
    ):  # XLA copies first, as an operation of its own, where it cannot be in place
        return sources[1], sources[1]
    return shape, *sources


def unestimated_bytes(hlo: str) -> int:
    """Operands and results, in HBM or VMEM, of the operations outside kernels, loops and prefetches
    without an estimate."""
    total = 0
    for shape, operation, sources, line in _operations(hlo):
        if operation in ("kernel", "while") or operation.endswith("-start"):
            continue
        if '"estimated_cycles"' not in line:
            both = _moved(shape, operation, sources)
            total += sum(_bytes(x, in_hbm=True) + _bytes(x, in_hbm=False) for x in both)
    return total


def _operations(hlo: str):
    """(result, operation, operands, line) of what the program's entry does; a Pallas kernel is a
    "kernel"."""
    entry = hlo[hlo.index("\nENTRY ") :].splitlines()
    found = [(*match.groups(), line) for line in entry if (match := _INSTRUCTION.match(line))]
    shapes = {name: shape for name, shape, *_ in found}
    for _, shape, operation, operands, line in found:
        if operation in _FREE or operation.endswith("-done"):
            continue
        if 'custom_call_target="tpu_custom_call"' in line:
            operation = "kernel"
        sources = [shapes.get(x, "") for x in re.findall(r"%([\w.\-]+)", operands)]
        yield shape, operation, sources, line


def _bytes(shape: str, in_hbm: bool) -> int:
    """Of the arrays in a type that lie in HBM, or that lie in VMEM."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if (not re.search(r"S\(\d", layout)) if in_hbm else "S(1)" in layout:
            size = _BYTES.get(dtype) or int(re.sub(r"\D", "", dtype) or 0) // 8
            total += size * math.prod(int(d) for d in dims.split(",") if d)
    return total
