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
    """Fields of a Pallas TPU kernel's static cost.

    Shares and counts are per pass of the grid loop's body, with inner loops run.

    steps: number of grid steps, over all cores.
    bundles: VLIW bundles in the grid loop's body, each once. step_cycles: the same, inner loops
      run.
    cycles: of the whole grid on one core (v5p has two, and splits parallel axes between them).
    mxu_share: share of the cycles that issue to a matrix unit.
    load_share, store_share: share of the vector load and store slots in use.
    spills, fills: vector registers stored to memory and loaded back, per step.
    spill_share: share of the bundles that are gone where the compiler packs the kernel without
      spills.
    hbm_bytes: bytes of the blocks moved, a block again each time its index changes; None where the
      kernel moves data itself. least_hbm_bytes: bytes of every operand and result once.
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
    """Result of `measure`: static costs of a program's Pallas kernels and XLA operations.

    xla_cycles: the compiler's own estimates for the operations outside kernels, loops run.
    unestimated_bytes: bytes moved by operations that the compiler does not estimate, such as a
      change of layout; they are not in xla_cycles.
    hbm_bytes: bytes of the blocks that kernels move, and of XLA operations' operands and results
      that lie in HBM; None where there are loops.
    least_hbm_bytes: bytes of the program's arguments and results once.
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
    """Result of `read_loops`: how often each VLIW bundle of a kernel is issued.

    in_grid: per bundle, whether it lies in the grid loop's body.
    times: how often one pass of that body (outside it, the kernel) issues each bundle.
    grid_trips: how often the grid loop's body runs on one core.
    """

    in_grid: np.ndarray
    times: np.ndarray
    grid_trips: int


def measure(topology: str, function, *arguments) -> ProgramCost:
    """Compiles `function(*arguments)` for one TPU device and returns the ProgramCost.

    topology: a TPU generation such as "v6e", or a slice of it such as "v6e:2x2".
    Raises what `tpu_compile.compile_for` raises, and ValueError for kernels that share a name.
    """
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
    """Reads how often each bundle is issued from a kernel's `final_bundles` listing.

    A loop reaches from the bundle that starts a region to the branch back to it. Its exit test
    gives the number of iterations: from 0 to a limit by the tested counter's step, or one where the
    limit is no constant.
    The grid loop's counter runs a little past the grid's `steps`, to fill and drain the pipeline;
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
    """Reads a utilization listing: each unit's slots, and the slots that each bundle uses."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split())))
    rows = np.array([line.split() for line in lines[4:] if line.strip()], int)
    return capacity, {name: rows[:, i] for i, name in enumerate(names)}


def pallas_calls(jaxpr):
    """Yields the pallas_call equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in inner_jaxprs(equation):
            yield from pallas_calls(inner)


def inner_jaxprs(equation) -> list:
    """Returns the jaxprs in an equation's parameters: loop bodies, branches, called functions."""
    values = list(equation.params.values())
    leaves = jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns"))
    jaxprs = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def _call_of(instruction: str, calls) -> Any:
    """Returns the pallas_call compiled to an HLO instruction such as "name.1" or "jvp_name_.1"."""
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
    """Returns a pallas_call's HBM bytes: operands and results once, and all blocks that it moves.
    The second is None where the kernel moves data itself."""
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
    """Sums the compiler's cycle estimates over a program, a loop's body as often as it runs.

    Of a conditional's branches, the costliest counts.
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
    """Returns the HBM bytes of operations outside kernels; None for a program with loops.

    Operands and results count whole; a slice counts what it takes, an update in place what it puts.
    Operands and results of kernels that lie in VMEM are subtracted, since the kernels' own count
    takes them all to be in HBM.
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
    """Returns the bytes, in HBM or VMEM, moved by operations without a cycle estimate.

    Kernels, loops and prefetches are left out.
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
    """Yields (instruction, its operands' arrays) for the entry's instructions that cost time."""
    for instruction in module.computations[module.entry]:
        if instruction.operation not in _FREE and not instruction.operation.endswith("-done"):
            operands = module.operands(instruction, module.entry)
            yield instruction, [operand.arrays for operand in operands]


def _moved(instruction: hlo.Instruction, operands) -> list[list[hlo.Array]]:
    """Returns the arrays that an operation reads or writes, of a slice only what is taken."""
    if instruction.operation == "slice":
        return [instruction.arrays] * 2
    if instruction.operation == "dynamic-update-slice":  # in place: a copy is its own operation
        return [operands[1]] * 2
    return [instruction.arrays, *operands]


def _bytes(arrays: list[hlo.Array], in_hbm: bool) -> int:
    """Returns the bytes of the arrays in HBM (`in_hbm`), or of those in VMEM."""
    return sum(array.bytes for array in arrays if array.space == (0 if in_hbm else 1))
