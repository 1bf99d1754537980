"""Candidates of a plan: a config with a TPU slice, mesh, collective and batch size.

Whatever is wrong with them is found here, before anything is compiled.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import data
from experiments.planning import parts
from experiments.training import loop, steps
from seqmodels import sharding

Row = dict[str, object]
GIB = 2**30


class Candidate(NamedTuple):
    """A training config on a TPU slice, and the step that `train` would run there, uncompiled."""

    config: ConfigDict
    where: parts.Slice
    program: steps.Program

    @property
    def state_bytes(self) -> Row:
        """Returns the bytes of parameters and of optimizer state on one device."""
        state = self.program.abstract_state
        return {
            "parameters": _bytes_per_device(state.params),
            "optimizer": _bytes_per_device(state.opt_state),
        }


def _bytes_per_device(tree) -> int:
    """Returns the bytes of sharded arrays on one device; arrays in host memory do not count."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if "host" not in (leaf.sharding.memory_kind or "")
    )


def resolve(config: ConfigDict) -> ConfigDict:
    """Fills in a config's vocabulary size and row length, from its dataset if one is missing."""
    if config.model.get("vocab_size") and "seq_len" in config.data:
        return config.copy_and_resolve_references()
    dataset = data.make_dataset(config.data, "train")
    config = loop.resolve(config, dataset)
    with config.unlocked():
        config.data.seq_len = next(iter(dataset))["inputs"].shape[1]
    return config


def parse_mesh(text: str) -> dict[str, int]:
    """Parses a mesh: of "data=8,fsdp=16" returns {"data": 8, "fsdp": 16, "seq": 1, ...}.

    Raises:
      ValueError: not of that form, or an unknown or repeated axis; the message lists the axes.
    """
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\w+)=(-?[0-9]+)", part)
        if not found or found[1] not in sharding.MESH_AXES or found[1] in sizes:
            raise ValueError(
                f"mesh {text!r}: expected axes and sizes, each axis once, such as data=8,fsdp=16; "
                f"the axes are {', '.join(sharding.MESH_AXES)}"
            )
        sizes[found[1]] = int(found[2])
    return dict.fromkeys(sharding.MESH_AXES, 1) | sizes


def make(
    config: ConfigDict,
    where: parts.Slice,
    mesh: Mapping[str, int] | None = None,
    collective: str | None = None,
    batch_size: int | None = None,
    tokens_per_device: int | None = None,
) -> Candidate:
    """Returns the candidate of a config on a slice; an argument of None keeps the config's value.

    tokens_per_device: sets the batch to one sequence for each group of devices along the mesh axis
      "seq", with so many tokens on each device.

    Raises:
      ValueError: sizes that do not fit together; the message says which.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if mesh is not None:
            config.mesh = ConfigDict(dict(mesh))
        if collective is not None:
            parallel = dict(config.get("parallel", {})) | {"collective": collective}
            config.parallel = ConfigDict(parallel)
        if batch_size is not None:
            config.data.batch_size = batch_size
        if tokens_per_device is not None:
            ways = sharding.make_mesh(config.mesh, where.devices).shape["seq"]
            config.data.batch_size = len(where.devices) // ways
            config.data.seq_len = tokens_per_device * ways
            config.train.accumulate = 1
        config.data.eval_batch_size = 0
    return Candidate(config, where, steps.build(config, config.data.seq_len, where.devices))


def sweep(
    config: ConfigDict, where: parts.Slice, batch_sizes: Sequence[int]
) -> tuple[list[Candidate], list[str]]:
    """Returns a candidate for each mesh worth compiling, and a line of text per mesh left out.

    Meshes put all devices on fsdp or on data, or split them over data and fsdp, fsdp and seq, or
    fsdp and tensor, the second of these a power of four.
    """
    found, left_out = [], []
    for sizes in _meshes(len(where.devices)):
        for batch_size in batch_sizes:
            mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
            name = f"{mesh or 'one device'}, batch {batch_size}"
            try:
                candidate = make(config, where, sizes, batch_size=batch_size)
            except ValueError as error:
                left_out.append(f"{name}: {error}")
                continue
            state = sum(candidate.state_bytes.values())
            if state > where.part.hbm_bytes:
                gib = state / GIB
                left_out.append(f"{name}: parameters and optimizer state alone take {gib:.1f} GiB")
                continue
            found.append(candidate)
    return found, left_out


def _meshes(devices: int) -> Iterable[dict[str, int]]:
    alone = dict.fromkeys(sharding.MESH_AXES, 1)
    yield alone | {"fsdp": devices}
    yield alone | {"data": devices}
    for outer, inner in (("data", "fsdp"), ("fsdp", "seq"), ("fsdp", "tensor")):
        size = 4
        while size < devices:
            if devices % size == 0:
                yield alone | {outer: devices // size, inner: size}
            size *= 4
