"""Reads a compiled program's collectives: kind, mesh axes, bytes, how often, and seconds."""

import collections
import itertools
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments.planning import parts
from kernels_pallas.tools import hlo

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective instruction of a compiled program, as one device runs it.

    axes: mesh axes along which its groups of devices lie, such as "fsdp" or "data+fsdp".
    size: devices per group. times: executions per training step.
    received: least bytes that the device gets from others per execution: of an all-gather (n-1)/n
      of the result, of a reduce-scatter (n-1)/n of the operand, of an all-reduce both.
    receivers: mesh positions of the devices that a permute sends to; None is all devices.
    seconds: estimated time per execution, alone on the links of its axes.
    """

    name: str
    kind: str
    axes: str
    size: int
    times: int
    received: int
    seconds: float
    receivers: frozenset[int] | None = None


def read(
    visit: hlo.Visit, module: hlo.HloModule, mesh: Mesh, where: parts.Slice
) -> Collective | None:
    """Returns the Collective that a visited HLO instruction runs or starts, or None."""
    instruction = visit.instruction
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    operands = module.operands(instruction, visit.computation)
    given = sum(array.bytes for operand in operands for array in operand.arrays)
    result = sum(array.bytes for array in instruction.arrays)
    if kind == "all-reduce" and visit.computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion that keeps a slice of the sum
    groups = hlo.groups(instruction, mesh.size)
    size = max(map(len, groups))
    share = (size - 1) / max(size, 1)
    if instruction.operation == "all-gather-start":
        result -= given  # its result names the operand too
    received = {
        "all-gather": result * share,
        "all-reduce": 2 * given * share,
        "reduce-scatter": given * share,
        "all-to-all": given * share,
    }.get(kind, given)
    if size < 2:
        return None
    permute = kind == "collective-permute"
    axes = _axes(groups, mesh, permute)
    seconds = max(
        _seconds(kind, given, received, [mesh.devices.flat[i] for i in group], where)
        for group in (groups if permute else groups[:1])
    )
    receivers = frozenset(target for _, target in groups) if permute else None
    return Collective(
        instruction.name, kind, axes, size, visit.times, int(received), seconds, receivers
    )


def _seconds(kind: str, given: int, received: float, group: list, where: parts.Slice) -> float:
    """Returns a collective's seconds, the larger of its bytes' transfer time and its hops' latency.

    given: bytes of its operand. group: its devices. An all-to-all of n > 8 devices counts its bytes
      n/8 times, since they pass through other devices.
    """
    if kind == "collective-permute":
        # Each link carries the messages of as many devices as one message takes links.
        hops = max(parts.hops(where, *group), 1)
        return hops * max(given / where.links.bytes_per_second, parts.HOP_SECONDS)
    bandwidth, hops = parts.group_bandwidth(where, group)
    if kind == "all-reduce":
        hops *= 2
    if "all-to-all" in kind:
        received *= max(len(group) / 8, 1)
    return max(received / bandwidth, hops * parts.HOP_SECONDS)


def _axes(groups: list[tuple[int, ...]], mesh: Mesh, pairs: bool) -> str:
    """Returns the mesh axes, joined by "+", along which the devices of a group differ.

    pairs: the groups are a permute's (source, target) pairs. The text begins with "part of" where a
      group does not have all devices along the axes.
    """
    shape = mesh.devices.shape
    varying, sizes = set(), set()
    for group in groups:
        index = np.array(np.unravel_index(group, shape))
        varying |= set(np.flatnonzero((index != index[:, :1]).any(1)).tolist())
        sizes.add(len(group))
    names = "+".join(mesh.axis_names[i] for i in sorted(varying))
    whole = np.prod([shape[i] for i in sorted(varying)], initial=1)
    return names if pairs or sizes == {int(whole)} else f"part of {names}"


def grouped(found: list[Collective]) -> list[dict]:
    """Returns a row per kind, axes and size of collectives; bytes are what the busiest device
    gets."""
    rows = []

    def key(c):
        return c.axes, c.kind, c.size

    for (axes, kind, size), same in itertools.groupby(sorted(found, key=key), key):
        same = list(same)
        rows.append(
            {
                "kind": kind,
                "axes": axes,
                "devices": size,
                "instructions": len(same),
                "times a step": sum(c.times for c in same),
                "bytes received": _most_received(same),
                "seconds": sum(c.times * c.seconds for c in same),
            }
        )
    return rows


def _most_received(found: list[Collective]) -> int:
    by_device = collections.Counter({None: 0})
    for c in found:
        for device in c.receivers or (None,):
            by_device[device] += c.times * c.received
    return by_device.pop(None) + max(by_device.values(), default=0)
