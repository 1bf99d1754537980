"""Which programs a plan compiles: a config on slices, meshes, collectives and batch sizes; and what
is wrong before any is."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from experiments import data
from experiments.planning import compiled, parts
from experiments.training import loop, steps
from seqmodels import sharding

Row, Case = compiled.Row, compiled.Case


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with its vocabulary and length settled. Only a dataset that says neither is
    opened."""
    if config.model.get("vocab_size") and "seq_len" in config.data:
        return config.copy_and_resolve_references()
    dataset = data.make_dataset(config.data, "train")
    config = loop.resolve(config, dataset)
    with config.unlocked():
        config.data.seq_len = next(iter(dataset))["inputs"].shape[1]
    return config


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 8, "fsdp": 16} of "data=8,fsdp=16"; the axes that are not named have size 1.

    Raises:
      ValueError: not of that form, or no such axis; says which there are.
    """
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\w+)=(-?[0-9]+)", part)
        if not found or found[1] not in sharding.MESH_AXES or found[1] in sizes:
            raise ValueError(
                f"mesh {text!r}: expected axes and sizes, each axis once, such as data=8,fsdp=16; the axes are "
                f"{', '.join(sharding.MESH_AXES)}"
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
) -> Case:
    """One case; what is None is the config's.

    tokens_per_device: of the batch, in rows of that many tokens for each part of time.

    Raises:
      ValueError: sizes that do not fit together; says which.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if mesh is not None:
            config.mesh = ConfigDict(dict(mesh))
        if collective is not None:
            config.parallel = ConfigDict(
                dict(config.get("parallel", {})) | {"collective": collective}
            )
        if batch_size is not None:
            config.data.batch_size = batch_size
        if tokens_per_device is not None:
            ways = sharding.make_mesh(config.mesh, where.devices).shape["seq"]
            config.data.batch_size = len(where.devices) // ways
            config.data.seq_len = tokens_per_device * ways
            config.train.accumulate = 1
        config.data.eval_batch_size = 0
    return Case(config, where, steps.build(config, config.data.seq_len, where.devices))


def sweep(
    config: ConfigDict, where: parts.Slice, batch_sizes: Sequence[int]
) -> tuple[list[Case], list[str]]:
    """(the meshes worth compiling, why the others are not): all products of two of data, fsdp, seq
    and tensor in powers of four, and each axis alone, with each batch size."""
    cases, left_out = [], []
    for sizes in _meshes(len(where.devices)):
        for batch_size in batch_sizes:
            name = f"{_named(sizes)}, batch {batch_size}"
            try:
                case = make(config, where, sizes, batch_size=batch_size)
            except ValueError as error:
                left_out.append(f"{name}: {error}")
                continue
            state = sum(case.state_bytes.values())
            if state > where.part.hbm_bytes:
                gib = state / compiled.GIB
                left_out.append(f"{name}: parameters and optimizer state alone take {gib:.1f} GiB")
                continue
            cases.append(case)
    return cases, left_out


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


def _named(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def advice(row: Row) -> list[str]:
    """What to change so that a step fits, the cheapest first; [] where it does."""
    limit = usable_bytes(row)
    if row["needed_bytes"] <= limit and "estimate" in row:
        return []
    state = sum(row["state_bytes"].values())
    free, rest = limit - state, row["needed_bytes"] - state
    mesh, ways = row["mesh"], []
    rows = row["batch_size"] // math.prod(mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
    if free > 0 and row["remat"] != "full":
        ways.append("config.model.remat=full, which recomputes layers in the backward pass")
    if free > 0 and rows > row["accumulate"]:
        times = row["accumulate"] * max(rest / free, 2)
        pieces = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= min(times, rows))
        ways.append(f"config.train.accumulate={pieces}: the same batch in smaller pieces")
    elif free > 0:
        ways.append("a larger seq axis, since a device has one row already")
    if state > limit / 2 and row["zero"] < 3 and mesh.get("data", 1) * mesh.get("seq", 1) > 1:
        ways.append(
            "more of the mesh on fsdp, or config.parallel.zero=3: the state in smaller parts"
        )
    return [*ways, "a slice of more devices, or of a part with more HBM"]


def usable_bytes(row: Row) -> int:
    """HBM that a program may use: libtpu keeps some, and says how much where a program needs more."""
    return row.get("usable_bytes", row["hbm_bytes_a_device"])


def verdict(row: Row) -> str:
    """Fits, or by how much it does not and what to change."""
    needed, limit = row["needed_bytes"] / compiled.GIB, usable_bytes(row) / compiled.GIB
    ways = advice(row)
    if not ways:
        return f"fits: {needed:.1f} of {limit:.0f} GiB a device"
    return f"does not fit: {needed:.1f} GiB, {needed - limit:.1f} more than a device has. Try {'; or '.join(ways)}"
