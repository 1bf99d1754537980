"""TPU slices: the links of each generation, and where each number is from.

A device is what JAX calls one: a chip, and on tpu7x half of one. `tpu_compile.PARTS` has its HBM,
HBM bandwidth and peak.

Links (ICI): every chip has two per dimension of its torus. Google publishes the bytes per second
that all of a chip's links move in both directions together:

    v5e     400 GB/s, 2D   https://docs.cloud.google.com/tpu/docs/v5e
    v6e     800 GB/s, 2D   https://docs.cloud.google.com/tpu/docs/v6e (3200 Gbps one way)
    v5p    1200 GB/s, 3D   https://docs.cloud.google.com/tpu/docs/v5p
    tpu7x  1200 GB/s, 3D   https://docs.cloud.google.com/tpu/docs/tpu7x

which is 50, 100, 100 and 100 GB/s per link and direction. "How to Scale Your Model"
(https://jax-ml.github.io/scaling-book/tpus, chapter 2) plans with 45, 90 and 90 of these for v5e,
v5p and v6e, about 1 microsecond a hop, and no ring in a dimension that does not close: on v5e and
v6e one of fewer than 16 chips, on v5p (and, we take it, tpu7x) any of a slice whose shape is not
made of cubes of 4 x 4 x 4. So do we.
"""

import math
from typing import NamedTuple

from kernels_pallas.tools import tpu_compile

LINK_EFFICIENCY = 0.9
HOP_SECONDS = 1e-6
# Slices to name where one is unknown: those that Google rents out. libtpu takes more shapes.
KNOWN = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}


class Links(NamedTuple):
    """The links between chips of a TPU generation.

    chip_bytes_per_second: of all links of a chip, both directions. dimensions: of the torus.
      devices: JAX devices that share a chip's links.
    """

    chip_bytes_per_second: float
    dimensions: int
    devices: int = 1

    @property
    def bytes_per_second(self) -> float:
        """Returns the usable bytes per second of a link, one way, for one of the chip's devices."""
        return LINK_EFFICIENCY * self.chip_bytes_per_second / (4 * self.dimensions * self.devices)


LINKS = {
    "v5e": Links(400e9, 2),
    "v6e": Links(800e9, 2),
    "v5p": Links(1200e9, 3),
    "tpu7x": Links(1200e9, 3, devices=2),
}


class Slice(NamedTuple):
    """A TPU slice: its topology's name, its devices in libtpu's order, and its torus's shape."""

    topology: str
    devices: list
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return tpu_compile.part_of(self.topology)

    @property
    def part(self) -> tpu_compile.TpuPart:
        return tpu_compile.PARTS[self.name]

    @property
    def links(self) -> Links:
        return LINKS[self.name]

    def closes(self, dimension: int) -> bool:
        """Returns whether the chips along a dimension of the torus form a ring."""
        if self.links.dimensions == 2:
            return self.shape[dimension] == 16
        return all(size % 4 == 0 for size in self.shape)


def find(topology: str) -> Slice:
    """Returns the TPU slice with a topology's name, such as 'v5p:4x4x8'.

    Raises:
      ValueError: libtpu has no such slice; the usual ones are listed.
      ImportError: libtpu is not installed.
    """
    part = tpu_compile.part_of(topology)
    try:
        devices = tpu_compile.devices(topology)
    except ValueError as error:
        raise ValueError(
            f"libtpu has no slice {topology!r}; {part} comes in {', '.join(KNOWN[part])}"
        ) from error
    coordinates = [device.coords for device in devices]
    shape = tuple(1 + max(c) - min(c) for c in zip(*coordinates))[: LINKS[part].dimensions]
    return Slice(topology, devices, shape)


def hops(where: Slice, a, b) -> int:
    """Returns the number of links between devices a and b, the shorter way round in a ring."""
    apart = 0
    for dimension, size in enumerate(where.shape):
        steps = abs(a.coords[dimension] - b.coords[dimension])
        apart += min(steps, size - steps) if where.closes(dimension) else steps
    return apart


def group_bandwidth(where: Slice, group: list) -> tuple[float, int]:
    """Returns bytes per second that a device receives from its group, and hops to the farthest one.

    All groups of a mesh axis communicate at once. In each dimension of the torus a group has one
    link, or two where it is the whole of a ring; groups whose chips lie between each other's share
    the links. A group that is no box of chips gets at most one link.
    """
    link = where.links.bytes_per_second
    places = sorted({tuple(device.coords) for device in group})
    if len(places) == 1:  # devices of one chip, whose connection is faster than any link
        return link * 2 * where.links.dimensions, 1
    links, far, box = 0.0, 0, 1
    for dimension, size in enumerate(where.shape):
        along = sorted({place[dimension] for place in places})
        box *= len(along)
        if len(along) == 1:
            continue
        stride = math.gcd(*(b - a for a, b in zip(along, along[1:])))
        ring = where.closes(dimension) and stride * len(along) == size
        links += (2 if ring else 1) / stride
        far += (len(along) * stride) // 2 if ring else along[-1] - along[0]
    if box != len(places):
        links = min(links, 1.0)
    return link * links, far
