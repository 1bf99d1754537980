"""The only file that names mesh axes: which devices hold which part of what.

Mesh axes:      data    copies of the model, each with its part of the batch
                fsdp    parts of the batch too, with parameters and optimizer state split among them (ZeRO-3)
                seq     parts of the sequence
                tensor  heads and feed-forward channels
Logical axes (see `layers`) are mapped to them by RULES. `data` and `fsdp` work; `seq` and `tensor` are named so
that configs can be written, and refused until they do.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "seq", "tensor")

RULES = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("norm", None),
    ("layers", None),
)

BATCH_SPEC = PartitionSpec(("data", "fsdp"), "seq")


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """A mesh with the given size for each of MESH_AXES; one of them may be -1: whatever devices are left.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices; the numbers are given.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: 1 for axis in MESH_AXES} | dict(sizes)
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"mesh has no axis {unknown[0]!r}; its axes are {', '.join(MESH_AXES)}")
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, or -1 for one of them; got {given}")
    for axis in ("seq", "tensor"):
        if sizes[axis] != 1:
            raise ValueError(f"mesh axis {axis!r} must have size 1 in this version; got {given}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or len(devices) % fixed or (not open_axes and fixed != len(devices)):
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}, "
            f"and at most one may be -1 (the given ones multiply to {fixed})"
        )
    shape = [len(devices) // fixed if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES]
    # Linen's logical constraints need Auto axes; jax.make_mesh defaults to Explicit ones.
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def shardings(mesh: Mesh, boxed_tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree whose arrays carry logical axis names (as `Module.init` gives it,
    or an optimizer state made of such). Arrays without names are replicated.

    Raises:
      ValueError: a dimension is not divisible by the axes it is split over; names the leaf and the numbers.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed_tree), RULES)
    leaves = nn.meta.unbox(boxed_tree)

    def sharding(path, leaf, spec):
        for dimension, axes in zip(leaf.shape, spec):
            ways = _ways(mesh, axes)
            if dimension % ways:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)} of shape {leaf.shape} cannot be split: "
                    f"{dimension} is not divisible by {ways} ({axes}={ways} in the mesh)"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, leaves, specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches (B, T): rows over data and fsdp."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, seq_len: int) -> None:
    """Raises ValueError, with the numbers, where a batch does not divide over the mesh."""
    for size, axes, what in zip((batch_size, seq_len), BATCH_SPEC, ("batch_size", "seq_len")):
        ways = _ways(mesh, axes)
        if size % ways:
            raise ValueError(
                f"{what} {size} is not divisible by {ways}, the size of mesh axes {axes}: "
                f"use a multiple of {ways} or a smaller mesh"
            )


def _ways(mesh: Mesh, axes) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
