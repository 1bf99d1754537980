"""What a compiled step costs, and a model of how long it takes.

Counted, of one device and one step, loops as often as they run:
    FLOPs       of dots and convolutions, and of Pallas kernels' own dots (`kernel_flops`); element
      by element work is not counted
    HBM bytes   operands and results of every operation that lie in HBM, of slices and updates only
      what they touch, and copies
                between HBM and VMEM; a Pallas kernel's operands and results once each
    collectives as `collectives.Collective`

The time: operations run in the compiler's order, one after the other, each as long as its FLOPs at
peak, its bytes at HBM bandwidth, or the compiler's own `estimated_cycles` take, whichever is
longest; the last where the part's clock is known (v5e, v5p), and without it work element by element
takes no time but its bytes'. Copies and collectives that have a start and a done run beside them,
each kind one after the other, and a done waits. A Pallas kernel reaches KERNEL_SHARE of peak in its
dots; other dots of float32 take the passes that their precision asks for.

So it is an optimist's figure for what it counts: no stall, no overhead of launching, no skew
between devices, no input pipeline. It orders meshes; it promises no time.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from experiments.planning import collectives, hlo, parts

# As compiled for v6e (kernels_pallas/reports/tpu), our kernels do 0.25 to 0.68 of the dots that
# their bundles' two matrix units could, forward and backward of linear_attention and delta_rule in
# all decays; the mean is 0.51.
KERNEL_SHARE = 0.5
# Passes of bfloat16 products that a float32 product takes:
# https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision
_PASSES = {"highest": 6, "high": 3}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "opt-barrier", "while", "conditional", "call", "async-start", "async-update", "async-done", "iota",
}  # fmt: skip
_READS_A_PART = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass
class Cost:
    """Of a stretch of the program: seconds that pass, and what of them is waiting for collectives."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    waiting_seconds: float = 0.0
    compiler_cycles: float = 0.0

    def add(self, other: "Cost", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine + times * theirs)


class Machine(NamedTuple):
    """kernel_flops: of a Pallas kernel's whole grid, by pallas_call's name."""

    where: parts.Slice
    mesh: Mesh
    kernel_flops: Mapping[str, float]


def cost(program: hlo.Program, machine: Machine) -> Cost:
    """Of one run of the program on one device."""
    return _stretch(program, program.entry, machine)


def _stretch(program: hlo.Program, computation: str, machine: Machine) -> Cost:
    """Runs a computation's instructions in order on a clock of its own."""
    total, clock = Cost(), 0.0
    free = {"copies": 0.0, "links": 0.0}  # when each is done with what it was given
    done: dict[str, tuple[str, float]] = {}
    for instruction in program.computations[computation]:
        operation = instruction.operation
        if operation.endswith("-done"):
            kind, at = done.get(instruction.operands[0], ("copies", 0.0))
            if kind == "links":
                total.waiting_seconds += max(at - clock, 0.0)
            clock = max(clock, at)
            continue
        if operation in ("while", "call", "conditional"):
            inner = [_stretch(program, name, machine) for name in instruction.called]
            part = max(inner, key=lambda c: c.seconds, default=Cost())
            times = program.trips(instruction, computation) if operation == "while" else 1
            total.add(part, times)
            clock += times * part.seconds
            continue
        talk = _communication(program, computation, instruction, machine)
        own = _operation(program, computation, instruction, machine)
        total.add(own)
        total.communication_seconds += talk
        if operation.endswith("-start"):
            kind, length = (
                ("links", talk) if talk else ("copies", own.hbm_bytes / _bandwidth(machine))
            )
            free[kind] = max(clock, free[kind]) + length
            done[instruction.name] = kind, free[kind]
            continue
        total.compute_seconds += own.seconds
        total.waiting_seconds += talk
        clock += own.seconds + talk
    total.seconds = clock
    return total


def _communication(program, computation, instruction, machine) -> float:
    """Seconds of the collectives in this operation, which may be a fusion."""
    inside = [hlo.Visit(instruction, computation, 1, False)]
    if instruction.operation in ("fusion", "async-start"):
        inside += [visit for name in instruction.called for visit in program.within(name)]
    found = (collectives.of(visit, program, machine.mesh, machine.where) for visit in inside)
    return sum(c.seconds for c in found if c)


def _operation(program, computation, instruction, machine) -> Cost:
    own = Cost(hbm_bytes=hbm_bytes(program, computation, instruction))
    peak = machine.where.part.bf16_flops_per_second
    seconds = 0.0
    if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
        own.flops = own.kernel_flops = kernel_flops(instruction.name, machine.kernel_flops)
        seconds = own.flops / (KERNEL_SHARE * peak)
    inside = [hlo.Visit(instruction, computation, 1, False)]
    if instruction.operation == "fusion":
        inside += [visit for name in instruction.called for visit in program.within(name)]
    for visit in inside:
        flops = hlo.flops(program, visit)
        own.flops += flops
        seconds += flops * _passes(visit.instruction) / peak
    if estimate := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
        own.compiler_cycles = int(estimate[1])
    clock = machine.where.part.clock_hz
    cycles = own.compiler_cycles / clock if clock else 0.0
    own.seconds = max(seconds, own.hbm_bytes / _bandwidth(machine), cycles)
    return own


def _bandwidth(machine: Machine) -> float:
    return machine.where.part.hbm_bytes_per_second


def _passes(instruction: hlo.Instruction) -> int:
    precision = instruction.attribute("operand_precision") or ""
    return max(
        (n for name, n in _PASSES.items() if re.search(rf"\b{name}\b", precision)), default=1
    )


def kernel_flops(instruction: str, known: Mapping[str, float]) -> float:
    """Of the kernel whose name the instruction has: 'name.1', or 'jvp_name_.1' under a
    transformation. 0 of an unknown one."""
    name = re.sub(r"(\.\d+|\.clone)+$", "", instruction).rstrip("_")
    fitting = [key for key in known if name == key or name.endswith(f"_{key}")]
    return known[max(fitting, key=len)] if fitting else 0.0


def hbm_bytes(program: hlo.Program, computation: str, instruction: hlo.Instruction) -> int:
    """What this operation, not in a fusion, reads from HBM and writes there."""
    operation, known = instruction.operation, program.by_name[computation]
    if operation in _FREE or operation.endswith("-done"):
        return 0
    operands = [known[name] for name in instruction.operands if name in known]
    if operation.endswith("-start"):  # the result names the operand as well
        return sum(a.bytes for a in instruction.arrays if a.in_hbm)
    result = sum(a.bytes for a in instruction.arrays if a.in_hbm)
    if operation in _READS_A_PART:
        return result + (result if operands[0].arrays[0].in_hbm else 0)
    if operation == "dynamic-update-slice":
        return 2 * sum(a.bytes for a in operands[1].arrays if a.in_hbm)
    if operation != "fusion":
        return result + sum(a.bytes for o in operands for a in o.arrays if a.in_hbm)
    total = _written(program, instruction)
    for index, operand in enumerate(operands):
        if all(a.in_hbm for a in operand.arrays):
            total += min(
                _read(program, instruction.called[0], index), sum(a.bytes for a in operand.arrays)
            )
    return total


def _read(program: hlo.Program, fused: str, index: int) -> float:
    """Bytes that a fused computation reads of its parameter; infinite where it reads all of it."""
    body = program.computations[fused]
    parameters = [i.name for i in body if i.operation == "parameter" and i.attributes == str(index)]
    total, names = 0.0, set(parameters)
    for user in body:
        if not names & set(user.operands):
            continue
        if user.operation == "bitcast":
            names.add(user.name)
        elif user.operation in _READS_A_PART and user.operands[0] in names:
            total += sum(a.bytes for a in user.arrays)
        elif user.operation == "dynamic-update-slice" and user.operands[0] in names:
            continue  # in place: what it writes is counted with the result
        elif user.operation == "fusion":
            within = [i for i, name in enumerate(user.operands) if name in names]
            total += sum(_read(program, user.called[0], i) for i in within)
        else:
            return float("inf")
    return total


def _written(program: hlo.Program, fusion: hlo.Instruction) -> int:
    """Bytes of a fusion's results in HBM, of an update in place only the new part."""
    fused = fusion.called[0]
    root = program.by_name[fused][program.roots[fused]]
    ends = root.operands if root.operation == "tuple" else [root.name]
    total = 0
    for name, array in zip(ends, fusion.arrays):
        end, inside = program.by_name[fused][name], fused
        while end.operation in ("bitcast", "fusion") and end.operands:
            if end.operation == "fusion":
                inside = end.called[0]
                end = program.by_name[inside][program.roots[inside]]
            else:
                end = program.by_name[inside][end.operands[0]]
        if end.operation == "dynamic-update-slice":
            update = program.by_name[inside][end.operands[1]]
            array = update.arrays[0]._replace(in_hbm=array.in_hbm)
        total += array.bytes if array.in_hbm else 0
    return total
