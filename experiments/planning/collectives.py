"""What devices tell each other in a compiled program: kind, mesh axes, bytes, how often, how long."""

import collections
import itertools
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments.planning import hlo, parts

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective instruction, of one device.

    axes: the mesh axes along which its groups lie, such as "fsdp" or "data+fsdp".
    size: devices of a group. times: in a step. received: bytes that the device gets from others
      each time, the least there can be: of an all-gather (n-1)/n of the result, of a reduce-scatter
      (n-1)/n of the operand, of an all-reduce both.
    receivers: positions in the mesh of the devices that a permute sends to; None is all.
    seconds: each time, alone on the links of its axes.
    """

    name: str
    kind: str
    axes: str
    size: int
    times: int
    received: int
    seconds: float
    receivers: frozenset[int] | None = None


def of(visit: hlo.Visit, program: hlo.Program, mesh: Mesh, where: parts.Slice) -> Collective | None:
    """The collective that this instruction starts, or is; None for anything else."""
    instruction = visit.instruction
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    known = program.by_name[visit.computation]
    operands = [known[name] for name in instruction.operands if name in known]
    given = sum(array.bytes for operand in operands for array in operand.arrays)
    result = sum(array.bytes for array in instruction.arrays)
    if kind == "all-reduce" and visit.computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion that keeps a slice of the sum
    groups = _groups(instruction, mesh.size)
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
    """Bytes at the group's bandwidth, or a hop's latency for every hop, whichever is longer.

    An all-to-all sends each byte over half the way round, on average: a quarter of the group's
    chips.
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


def _groups(instruction: hlo.Instruction, devices: int) -> list[tuple[int, ...]]:
    """Positions in the mesh of the devices that talk to each other. Of a permute: (source, target).

    Groups come as lists; as a shape that numbers are put into, after a transposition; or as axes of
    a mesh of XLA's own.
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
        ids = _iota(_numbers(shape) if shape else [*sizes.values()], order).reshape(
            [*sizes.values()]
        )
        return _along(ids, list(sizes), along)
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        shape, of, order = iota.groups()
        return [
            tuple(map(int, group)) for group in _iota(_numbers(of), order).reshape(_numbers(shape))
        ]
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = re.findall(r"\{([\d,]+)\}", lists[1] if lists else "")
    return [tuple(_numbers(group)) for group in groups] or [tuple(range(devices))]


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(shape: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _along(ids: np.ndarray, names: list[str], along: str) -> list[tuple[int, ...]]:
    """Groups along some axes, of which one may be only a factor: 'x':(2)4 is the 4 of x = 2 * 4 *
    rest."""
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", along):
        i = names.index(name)
        split = (int(before), int(size), ids.shape[i] // (int(before) * int(size)))
        ids = ids.reshape(ids.shape[:i] + split + ids.shape[i + 1 :])
        names[i : i + 1] = [f"{name} before", name, f"{name} after"]
    moved = [names.index(name) for name in re.findall(r"'([^']+)'", along)]
    ids = np.moveaxis(ids, moved, range(-len(moved), 0))
    size = int(np.prod(ids.shape[-len(moved) :]))
    return [tuple(map(int, group)) for group in ids.reshape(-1, size)]


def _axes(groups: list[tuple[int, ...]], mesh: Mesh, pairs: bool) -> str:
    """Mesh axes whose index varies within a group; "part of" them where a group that is no pair is
    not all of it."""
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
    """A row for every kind and axes: how many a step, what the device that receives most gets in a
    step, seconds."""
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
