"""Measures a TPU kernel as compiled: static cycles, slots in use, spills, VMEM, HBM traffic.

Nothing is run.

    from kernels_pallas.tools import tpu_bundles

    program = tpu_bundles.measure("v6e", function, *shapes)     # as `tpu_compile.compile_for`
    for kernel in program.kernels: print(kernel)
    program.cycles / tokens                                     # kernels and XLA's own operations

A TPU core issues one VLIW bundle per cycle where nothing stalls. The compiler's listing has every
bundle with the depth of its loop; a bundle counts as often as its loops run, a branch (`pl.when`)
as if always taken. `cycles` therefore holds no wait for HBM and no stall: it is a figure to compare
kernels by, of the order of a nanosecond each on a v6e.

Kernels are told apart by `pallas_call(name=...)`: give each its own.
"""

import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from kernels_pallas.tools import hlo, tpu_compile


class KernelCost(NamedTuple):
    """A pallas_call's cost. Shares and counts: per pass of the grid loop's body, inner loops run.

    steps: the grid's product, of which each core takes its part.
    bundles: in the grid loop's body, each once. step_cycles: the same with inner loops run.
    cycles: of the whole grid on one core (v5p has two, and splits parallel axes between them).
    mxu_share: of the cycles, those that issue to a matrix unit. load_share, store_share: of the
      vector load and store slots.
    spills, fills: vector registers stored to memory and loaded back, per step. spill_share: of the
      kernel's bundles, those that are gone where the compiler packs it without them.
    hbm_bytes: blocks moved, a block again each time its index changes; None where the kernel moves
      data itself. least_hbm_bytes: every operand and result once.
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


class ProgramCost(NamedTuple):
    """The costs of a program's kernels, and of XLA's operations around them.

    xla_cycles: the compiler's own estimates for the operations outside kernels, loops run.
    unestimated_bytes: what the operations without an estimate move, such as a change of layout;
      they are not in xla_cycles.
    hbm_bytes: blocks that kernels move, and operands and results of XLA's operations as far as they
      lie in HBM; None where there are loops. least_hbm_bytes: arguments and results once.
    """

    compiled: tpu_compile.CompiledProgram
    kernels: list[KernelCost]
    xla_cycles: int
    unestimated_bytes: int
    hbm_bytes: int | None
    least_hbm_bytes: int

    @property
    def cycles(self) -> int:
        return self.xla_cycles + sum(kernel.cycles for kernel in self.kernels)


class ListingLoops(NamedTuple):
    """The loops of bundles: which are in the grid loop's body, and how often a pass issues each."""

    in_grid: np.ndarray
    times: np.ndarray
    grid_trips: int


def measure(topology: str, function, *arguments) -> ProgramCost:
    """Compiles as `tpu_compile.compile_for` does, and returns the program's cost."""
    compiled = tpu_compile.compile_for(topology, function, *arguments)
    with tpu_compile.tracing_for(topology):
        calls = list(pallas_calls(jax.jit(function).trace(*arguments).jaxpr.jaxpr))
    kernels = []
    for instruction, listing in compiled.listings.items():
        call = _call_of(instruction, calls)
        grid = call.params["grid_mapping"].grid
        kernels.append(_kernel(str(call.params["name"]), grid, call, listing))
    kernels.sort(key=lambda kernel: kernel.name)
    module = hlo.HloModule(compiled.hlo)
    traffic = xla_bytes(module)
    if traffic is not None:
        traffic += sum(kernel.hbm_bytes or kernel.least_hbm_bytes for kernel in kernels)
    memory = compiled.memory
    least = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return ProgramCost(
        compiled, kernels, xla_cycles(module), unestimated_bytes(module), traffic, least
    )


def _kernel(name: str, grid, call, listing: tpu_compile.Listing) -> KernelCost:
    steps = math.prod(grid)
    loops = read_loops(listing.bundles, steps)
    capacity, used = read_utilization(listing.utilization)
    times = np.where(loops.in_grid, loops.times, 0)
    step_cycles = int(times.sum())
    count = {unit: int((times * used[unit]).sum()) for unit in used}
    outside = int(np.where(loops.in_grid, 0, loops.times).sum())
    least, moved = _traffic(call)
    return KernelCost(
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
_DELAY_SLOTS = 4  # bundles after a branch that are issued either way


def read_loops(bundles: str, steps: int) -> ListingLoops:
    """Reads a `final_bundles` listing of a kernel whose grid has `steps` steps.

    A loop reaches from the bundle that starts a region to the branch back to it. Its exit test
    gives its trips: from 0 to a limit by the tested counter's step, or one where the limit is no
    constant. The grid loop's counter runs a little past the steps, to fill and drain the pipeline;
    those rounds skip the body and do not count. A grid of one step has no loop: the whole kernel is
    the body.
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
                # Two cores share the grid of a v5p: then the counter's limit is below its steps.
                grid_trips = min(steps, trips - 2) if trips and trips > 2 else steps
            else:
                times[body] *= trips or 1
    return ListingLoops(in_grid, times, grid_trips)


def _trips(bundles: str, predicate: str) -> int | None:
    test = re.search(
        rf"%{predicate} = scmp\.ge\.s32\.totalorder (?:\([^)]*\), )?%(\w+), (\d+) "
        r"/\* loop exit test",
        bundles,
    )
    if test is None:
        return None
    counter, limit = test.groups()
    step = re.search(rf"%{counter} = sadd\.s32 (\d+),", bundles)
    return -(-int(limit) // (int(step[1]) if step else 1))


def read_utilization(text: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Reads a utilization listing: each unit's slots, and how many each bundle uses."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split())))
    rows = np.array([line.split() for line in lines[4:] if line.strip()], int)
    return capacity, {name: rows[:, i] for i, name in enumerate(names)}


def pallas_calls(jaxpr):
    """Yields the pallas_call equations of a jaxpr, and of jaxprs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in inner_jaxprs(equation):
            yield from pallas_calls(inner)


def inner_jaxprs(equation) -> list:
    """Returns the jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    values = list(equation.params.values())
    leaves = jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns"))
    jaxprs = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def _call_of(instruction: str, calls) -> Any:
    """Returns the pallas_call that became an instruction such as 'name.1' or 'jvp_name_.1'."""
    name = re.sub(r"\.\d+$", "", instruction).rstrip("_")
    endings = [re.sub(r"\W", "_", str(call.params["name"])) for call in calls]
    named = [c for c, e in zip(calls, endings) if name == e or name.endswith(f"_{e}")]
    longest = max((len(str(call.params["name"])) for call in named), default=0)
    named = [call for call in named if len(str(call.params["name"])) == longest]
    shapes = {(call.params["grid_mapping"].grid, str(call.params["out_avals"])) for call in named}
    if len(shapes) != 1:
        known = sorted({str(call.params["name"]) for call in calls})
        raise ValueError(
            f"kernel {instruction!r} of the compiled program is {len(shapes)} different "
            f"pallas_calls; give each a name= of its own (there are {', '.join(known)})"
        )
    return named[0]


def _traffic(call) -> tuple[int, int | None]:
    """Returns the bytes of operands and results, and those of all blocks moved.

    The second is None where the kernel moves data itself.
    """
    mapping = call.params["grid_mapping"]
    arrays = [v.aval for v in (*call.invars, *call.outvars)]
    least = sum(array.size * array.dtype.itemsize for array in arrays)
    points = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32)
    moved = 0
    for block in mapping.block_mappings:
        array, ref = block.array_aval, block.transformed_block_aval
        whole = array.size * array.dtype.itemsize
        index_map = block.index_map_jaxpr
        if str(ref).startswith(("Ref<any>", "Ref<hbm>")):
            return least, None
        if len(index_map.jaxpr.invars) != len(mapping.grid) or not mapping.grid:
            moved += whole
            continue
        # A block is fetched when its index differs from the step's before.
        index = jax.vmap(jaxpr_as_fun(index_map))(*points.T)
        index = np.stack([np.broadcast_to(i, len(points)) for i in index], 1)
        fetches = 1 + int((index[1:] != index[:-1]).any(1).sum())
        moved += fetches * min(math.prod(ref.shape) * array.dtype.itemsize, whole)
    return least, moved


def xla_cycles(module: hlo.HloModule) -> int:
    """Sums the compiler's `estimated_cycles`, loop bodies as often as they run.

    Of a conditional's branches the costliest counts.
    """

    def total(computation: str) -> int:
        cycles = 0
        for instruction in module.computations[computation]:
            if (estimate := instruction.estimated_cycles) is not None:
                cycles += estimate
                continue
            loop = instruction.operation == "while"
            times = module.trips(instruction, computation) if loop else 1
            inner = [total(name) for name in instruction.called]
            one = instruction.operation == "conditional"
            cycles += times * (max(inner, default=0) if one else sum(inner))
        return cycles

    return total(module.entry)


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def xla_bytes(module: hlo.HloModule) -> int | None:
    """Returns what operations outside kernels read and write in HBM; None where there are loops.

    Operands and results count whole, of a slice what is taken, of an update in place what is put.
    What kernels find or leave in VMEM is subtracted, since their own count takes all of their
    operands to be in HBM.
    """
    if any(i.operation == "while" for body in module.computations.values() for i in body):
        return None
    total = 0
    for instruction, operands in _operations(module):
        if instruction.is_kernel:
            total -= sum(_bytes(x, in_hbm=False) for x in (instruction.arrays, *operands))
        elif instruction.operation.endswith("-start"):
            # A copy of what it writes, of all of its operand or a slice of it. The result of a
            # slice begins with its operands, in a tuple of their own.
            first = sum(map(len, operands)) if instruction.result.startswith("((") else 0
            written = instruction.arrays[first : first + 1]
            size = _bytes(written, in_hbm=True) or _bytes(written, in_hbm=False)
            total += _bytes(written, in_hbm=True)
            total += min(size, sum(_bytes(x, in_hbm=True) for x in operands))
        else:
            total += sum(_bytes(x, in_hbm=True) for x in _moved(instruction, operands))
    return total


def unestimated_bytes(module: hlo.HloModule) -> int:
    """Returns what operations without an estimate move, in HBM or VMEM.

    Kernels, loops and prefetches are not among them.
    """
    total = 0
    for instruction, operands in _operations(module):
        if instruction.is_kernel or instruction.operation == "while":
            continue
        if instruction.operation.endswith("-start") or instruction.estimated_cycles is not None:
            continue
        moved = _moved(instruction, operands)
        total += sum(_bytes(x, in_hbm=True) + _bytes(x, in_hbm=False) for x in moved)
    return total


def _operations(module: hlo.HloModule):
    """Yields the entry's instructions that cost something, with their operands' arrays."""
    for instruction in module.computations[module.entry]:
        if instruction.operation not in _FREE and not instruction.operation.endswith("-done"):
            operands = module.operands(instruction, module.entry)
            yield instruction, [operand.arrays for operand in operands]


def _moved(instruction: hlo.Instruction, operands) -> list[list[hlo.Array]]:
    """Returns the results and operands that an operation reads and writes."""
    if instruction.operation == "slice":
        return [instruction.arrays] * 2
    if instruction.operation == "dynamic-update-slice":  # in place: a copy is its own operation
        return [operands[1]] * 2
    return [instruction.arrays, *operands]


def _bytes(arrays: list[hlo.Array], in_hbm: bool) -> int:
    """Returns the bytes of those arrays that lie in HBM, or of those that lie in VMEM."""
    return sum(array.bytes for array in arrays if array.space == (0 if in_hbm else 1))
