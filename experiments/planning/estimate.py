"""Counts what a compiled step costs, and models how long it takes.

Counted, of one device and one step, loops as often as they run:

    FLOPs        of dots and convolutions, and of Pallas kernels' own dots (`kernel_flops`); work
                 element by element is not counted
    HBM bytes    operands and results of every operation that lie in HBM, of slices and updates only
                 what they touch, and copies between HBM and VMEM; of a Pallas kernel its operands
                 and results once each
    collectives  as `collectives.Collective`

Time: operations run in the compiler's order, one after the other, each as long as its FLOPs at
peak, its bytes at HBM bandwidth, or the compiler's own `estimated_cycles`, whichever is longest.
The last needs the part's clock (v5e, v5p); without it work element by element takes the time of its
bytes. Copies and collectives that have a start and a done run beside them, each kind one after the
other, and a done waits. A Pallas kernel reaches KERNEL_SHARE of peak in its dots; other float32
dots take the passes that their precision asks for.

So the figure is an optimist's: no stalls, no overhead of launching, no skew between devices, no
input pipeline. It orders meshes; it promises no time.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from experiments.planning import collectives, parts
from kernels_pallas.tools import hlo

# Kernels' static bundles on v6e use 0.25 to 0.68 of the matrix units, 0.51 on average
# (kernels_pallas/reports/tpu).
KERNEL_SHARE = 0.5
# Passes of bfloat16 products that a float32 product takes:
# https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision
_PASSES = {"highest": 6, "high": 3}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id",
    "after-all", "opt-barrier", "while", "conditional", "call", "async-start", "async-update",
    "async-done", "iota",
}  # fmt: skip
_READS_PART = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass
class StepCost:
    """Cost of running some operations of a compiled step on one device.

    communication_seconds: of all collectives. waiting_seconds: of those that operations wait for.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    waiting_seconds: float = 0.0
    compiler_cycles: float = 0.0

    def add(self, other: "StepCost", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine + times * theirs)


class Machine(NamedTuple):
    """The slice and mesh that a program runs on, and the FLOPs of its Pallas kernels by name."""

    where: parts.Slice
    mesh: Mesh
    kernel_flops: Mapping[str, float]

    @property
    def hbm_bandwidth(self) -> float:
        return self.where.part.hbm_bytes_per_second


def cost(module: hlo.HloModule, machine: Machine) -> StepCost:
    """Returns the cost of one run of a compiled program on one device."""
    return _sequence(module, module.entry, machine)


def _sequence(module: hlo.HloModule, computation: str, machine: Machine) -> StepCost:
    """Returns the cost of an HLO computation, whose instructions it simulates in order."""
    total, clock = StepCost(), 0.0
    free = {"copies": 0.0, "links": 0.0}  # when each has done what it was given
    done: dict[str, tuple[str, float]] = {}
    for instruction in module.computations[computation]:
        operation = instruction.operation
        # A done waits for what its start began.
        if operation.endswith("-done"):
            kind, at = done.get(instruction.operands[0], ("copies", 0.0))
            if kind == "links":
                total.waiting_seconds += max(at - clock, 0.0)
            clock = max(clock, at)
            continue
        # A computation inside has a clock of its own; of branches the longest counts.
        if operation in ("while", "call", "conditional"):
            inner = [_sequence(module, name, machine) for name in instruction.called]
            longest = max(inner, key=lambda c: c.seconds, default=StepCost())
            times = module.trips(instruction, computation) if operation == "while" else 1
            total.add(longest, times)
            clock += times * longest.seconds
            continue
        sent = _collective_seconds(module, computation, instruction, machine)
        own = _operation(module, computation, instruction, machine)
        total.add(own)
        total.communication_seconds += sent
        # A start queues behind others of its kind, and the clock goes on.
        if operation.endswith("-start"):
            kind, length = (
                ("links", sent) if sent else ("copies", own.hbm_bytes / machine.hbm_bandwidth)
            )
            free[kind] = max(clock, free[kind]) + length
            done[instruction.name] = kind, free[kind]
            continue
        total.compute_seconds += own.seconds
        total.waiting_seconds += sent
        clock += own.seconds + sent
    total.seconds = clock
    return total


def _collective_seconds(module, computation, instruction, machine) -> float:
    """Returns the seconds of the collectives in an HLO instruction, which may be a fusion."""
    inside = _visits(module, computation, instruction, ("fusion", "async-start"))
    found = (collectives.read(visit, module, machine.mesh, machine.where) for visit in inside)
    return sum(c.seconds for c in found if c)


def _operation(module, computation, instruction, machine) -> StepCost:
    """Returns the cost of one HLO instruction, fused ones included, without its collectives."""
    own = StepCost(hbm_bytes=hbm_bytes(module, computation, instruction))
    peak = machine.where.part.bf16_flops_per_second
    seconds = 0.0
    if instruction.is_kernel:
        own.flops = own.kernel_flops = kernel_flops(instruction.name, machine.kernel_flops)
        seconds = own.flops / (KERNEL_SHARE * peak)
    for visit in _visits(module, computation, instruction, ("fusion",)):
        flops = hlo.flops(module, visit)
        own.flops += flops
        seconds += flops * _passes(visit.instruction) / peak
    own.compiler_cycles = instruction.estimated_cycles or 0
    clock = machine.where.part.clock_hz
    cycles = own.compiler_cycles / clock if clock else 0.0
    own.seconds = max(seconds, own.hbm_bytes / machine.hbm_bandwidth, cycles)
    return own


def _visits(module, computation, instruction, entered: tuple[str, ...]):
    """Yields an operation, and what is inside it where it is one of those `entered`."""
    yield hlo.Visit(instruction, computation, 1, False)
    for name in instruction.called if instruction.operation in entered else ():
        yield from module.within(name)


def _passes(instruction: hlo.Instruction) -> int:
    precision = instruction.attribute("operand_precision") or ""
    return max(
        (n for name, n in _PASSES.items() if re.search(rf"\b{name}\b", precision)), default=1
    )


def kernel_flops(instruction: str, known: Mapping[str, float]) -> float:
    """Returns the FLOPs of the Pallas kernel that an HLO instruction runs; 0 if no name fits.

    instruction: its name, 'name.1' or 'jvp_name_.1'. known: FLOPs by the kernel's name.
    """
    name = re.sub(r"(\.\d+|\.clone)+$", "", instruction).rstrip("_")
    fitting = [key for key in known if name == key or name.endswith(f"_{key}")]
    return known[max(fitting, key=len)] if fitting else 0.0


def hbm_bytes(module: hlo.HloModule, computation: str, instruction: hlo.Instruction) -> int:
    """Returns the bytes that an HLO instruction outside fusions reads and writes in HBM."""
    operation = instruction.operation
    if operation in _FREE or operation.endswith("-done"):
        return 0
    operands = module.operands(instruction, computation)
    if operation.endswith("-start"):  # the result names the operand as well
        return sum(a.bytes for a in instruction.arrays if a.in_hbm)
    result = sum(a.bytes for a in instruction.arrays if a.in_hbm)
    if operation in _READS_PART:
        return result + (result if operands[0].arrays[0].in_hbm else 0)
    if operation == "dynamic-update-slice":
        return 2 * sum(a.bytes for a in operands[1].arrays if a.in_hbm)
    if operation != "fusion":
        return result + sum(a.bytes for o in operands for a in o.arrays if a.in_hbm)
    total = _written(module, instruction)
    for index, operand in enumerate(operands):
        if all(a.in_hbm for a in operand.arrays):
            total += min(
                _read(module, instruction.called[0], index), sum(a.bytes for a in operand.arrays)
            )
    return total


def _read(module: hlo.HloModule, fused: str, index: int) -> float:
    """Returns the bytes read of parameter `index` by the fusion called `fused`; inf means all."""
    body = module.computations[fused]
    parameters = [i.name for i in body if i.operation == "parameter" and i.attributes == str(index)]
    total, names = 0.0, set(parameters)
    for user in body:
        if not names & set(user.operands):
            continue
        if user.operation == "bitcast":
            names.add(user.name)
        elif user.operation in _READS_PART and user.operands[0] in names:
            total += sum(a.bytes for a in user.arrays)
        elif user.operation == "dynamic-update-slice" and user.operands[0] in names:
            continue  # in place: what it writes is counted with the result
        elif user.operation == "fusion":
            within = [i for i, name in enumerate(user.operands) if name in names]
            total += sum(_read(module, user.called[0], i) for i in within)
        else:
            return float("inf")
    return total


def _written(module: hlo.HloModule, fusion: hlo.Instruction) -> int:
    """Returns the bytes that a fusion writes to HBM; an in-place update counts what it changes."""
    fused = fusion.called[0]
    root = module.root(fused)
    ends = root.operands if root.operation == "tuple" else [root.name]
    total = 0
    for name, array in zip(ends, fusion.arrays):
        # Back through bitcasts and fusions to the operation that makes this result.
        end, inside = module.by_name[fused][name], fused
        while end.operation in ("bitcast", "fusion") and end.operands:
            if end.operation == "fusion":
                inside = end.called[0]
                end = module.root(inside)
            else:
                end = module.by_name[inside][end.operands[0]]
        if end.operation == "dynamic-update-slice":
            update = module.by_name[inside][end.operands[1]]
            array = update.arrays[0]._replace(space=array.space)
        total += array.bytes if array.in_hbm else 0
    return total
