"""Shardings: which device holds which part of each array. No other file names mesh axes.

Mesh axes:
    pipe    groups of consecutive layers (`pipeline`)
    data    copies of the model, each with its part of the batch
    fsdp    parts of the batch too; parameters and optimizer state are split among them (ZeRO-3)
    seq     parts of the sequence: context parallelism
    tensor  heads, feed-forward channels and words

Any product of them is one line of a config, `config.mesh = {"data": 2, "seq": 4}`. RULES map the
logical axes of parameters (see `layers`) to them, `axes_of` the letters of activations.

A program is traced inside `scope(mesh, ...)`: operators (`seqmodels.operators`) then run on each
device's part, and everything else is partitioned by the compiler.
"""

import contextlib
import contextvars
import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import compute_on
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas.context_parallel.collectives import COLLECTIVES
from seqmodels.array_typing import Array
from seqmodels.fields import checked
from seqmodels.modules import layers

BATCH_AXES = ("data", "fsdp")
TIME_AXIS = "seq"
HEAD_AXIS = "tensor"
STAGE_AXIS = "pipe"
MESH_AXES = (STAGE_AXIS, *BATCH_AXES, TIME_AXIS, HEAD_AXIS)
# By how much their devices send each other, the least first.
QUIETEST_FIRST = ("data", STAGE_AXIS, "fsdp", TIME_AXIS, HEAD_AXIS)
COPY_AXES = ("data", TIME_AXIS)  # hold copies of the parameters, unless ZeRO splits them

RULES = (
    ("embed", "fsdp"),
    ("heads", HEAD_AXIS),
    ("mlp", HEAD_AXIS),
    ("vocab", HEAD_AXIS),
    ("norm", None),
    ("layers", STAGE_AXIS),
)

BATCH_SPEC = PartitionSpec(BATCH_AXES, TIME_AXIS)
ZERO_STAGES = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of parallel training on a mesh: the fields of a config's section `parallel`.

    collective: how recurrent states pass along the mesh axis `seq`: "all_gather" (LASP-2, arXiv
      2502.07563), "all_scan" (ZeCO, arXiv 2507.01004) or "ring" (LASP-1, arXiv 2404.02882). Softmax
      attention has ring attention with "ring", and else gathers keys and values.
    zero: what ZeRO (arXiv 1910.02054) splits over `data` and `seq`, whose devices otherwise hold
      copies: 0 nothing, 1 the optimizer state, 2 gradients too, 3 parameters too. `fsdp` always
      splits all three.
    offload: whether the optimizer state lies in the host's pinned memory and is updated there
      (ZeRO-Offload, arXiv 2101.06840).
    microbatches: number of microbatches of a pipeline, where `pipe` > 1; 0 is one per stage.
    split_backward: whether the pipeline's backward pass first computes all gradients of
      activations, and then those of weights (2BP, arXiv 2405.18047).
    """

    collective: str = "all_gather"
    zero: int = 0
    offload: bool = False
    microbatches: int = 0
    split_backward: bool = False

    def __post_init__(self):
        if self.collective not in COLLECTIVES:
            raise ValueError(
                f"parallel.collective is {self.collective!r}; "
                f"choose one of {', '.join(COLLECTIVES)}"
            )
        if self.zero not in ZERO_STAGES:
            raise ValueError(
                f"parallel.zero is {self.zero!r}; expected 0 (copies), "
                "1 (the optimizer state is split), 2 (gradients too) or 3 (parameters too)"
            )
        if self.microbatches < 0:
            raise ValueError(f"parallel.microbatches is {self.microbatches}; expected 0 or more")

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "Options":
        """Makes Options of a config's section `parallel`.

        Raises ValueError for an unknown field or a value of a wrong type or range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"parallel has no field {unknown[0]!r}; it has {', '.join(known)}")
        kinds = typing.get_type_hints(cls)
        return cls(**{k: checked(f"parallel.{k}", v, kinds[k]) for k, v in fields.items()})


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """Returns a Mesh with the axes MESH_AXES over `devices`, by default all devices.

    sizes: {axis: size}; axes that are left out have size 1, and one size may be -1, which takes the
      devices that are left. Several TPU slices, or several hosts with GPUs, are split along `data`
      if its size allows it, else along the next axes of QUIETEST_FIRST.

    Raises:
      ValueError: an unknown axis, sizes whose product is not the number of devices, or axes that
        cannot be laid along the torus of a slice; the message gives the numbers.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: 1 for axis in MESH_AXES} | dict(sizes)
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"mesh has no axis {unknown[0]!r}; its axes are {', '.join(MESH_AXES)}")
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, or -1 for one of them; got {given}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or len(devices) % fixed or (not open_axes and fixed != len(devices)):
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices: the sizes must multiply to "
            f"{len(devices)}, and at most one may be -1 (the given ones multiply to {fixed})"
        )
    shape = [len(devices) // fixed if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES]
    # Linen's logical constraints need Auto axes; jax.make_mesh defaults to Explicit ones.
    types = (AxisType.Auto,) * len(MESH_AXES)
    # Each axis is a part between slices times a part within one.
    slices = _slices(devices)
    between = _between_slices(shape, len(slices))
    within = [size // ways for size, ways in zip(shape, between)]
    try:
        parts = [jax.make_mesh(within, MESH_AXES, types, devices=part).devices for part in slices]
    except NotImplementedError as error:
        torus = " x ".join(str(len(set(at))) for at in zip(*(d.coords for d in slices[0])))
        raise ValueError(
            f"mesh {given} cannot be laid on these devices: the size of every axis must be a "
            f"product of some of the slice's dimensions {torus}"
            + (f", times a divisor of {len(slices)} slices" if slices[1:] else "")
        ) from error
    laid = np.stack(parts).reshape(*between, *within)
    pairs = [axis for i in range(len(shape)) for axis in (i, len(shape) + i)]
    return Mesh(laid.transpose(pairs).reshape(shape), MESH_AXES, axis_types=types)


def _slices(devices) -> list[list]:
    """Returns the devices in groups with fast links: those of a TPU slice, or of a host with GPUs.

    Raises ValueError for groups of different sizes, over which no mesh can be laid.
    """
    slices = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(set(map(len, slices.values()))) > 1:
        counts = ", ".join(f"{index}: {len(part)}" for index, part in sorted(slices.items()))
        raise ValueError(
            f"the slices (of GPUs: hosts) have different numbers of devices ({counts}), over which "
            "no mesh can be laid: use as many of each"
        )
    return [slices[index] for index in sorted(slices)]


def _between_slices(shape: list[int], slices: int) -> list[int]:
    """Returns for each axis of a mesh of this shape the number of slices that it spans.

    The axes whose devices send each other least (QUIETEST_FIRST) span slices first.
    """
    between = [1] * len(shape)
    for axis in map(MESH_AXES.index, QUIETEST_FIRST):
        between[axis] = math.gcd(shape[axis], slices)
        slices //= between[axis]
    return between


_OPTIONS = contextvars.ContextVar("options")


@contextlib.contextmanager
def scope(mesh: Mesh, options: Options | None = None):
    """Context manager: code that is traced inside runs on `mesh`, with these parallel options.

    Enter it inside the function that is given to jax.jit, whose shardings name the devices.
    """
    token = _OPTIONS.set(options or Options())
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _OPTIONS.reset(token)


def options() -> Options:
    """Returns the Options of the enclosing `scope`, or default Options outside of one."""
    return _OPTIONS.get(Options())


def sizes() -> dict[str, int]:
    """Returns {axis: size} of the mesh in scope; {} without a mesh, or with one device.

    It is also {} inside jax.shard_map, where the compiler does not partition arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_types) != {AxisType.Auto} or mesh.size == 1:
        return {}
    return {axis: mesh.shape.get(axis, 1) for axis in MESH_AXES}


def axes_of(letter: str, size: int) -> tuple[str, ...]:
    """Returns the mesh axes over which an axis of activations is split, by the axis' letter.

    Letters: B rows, T time, H and G heads, D channels of heads, W vocabulary; "t" is time in code
    that treats each token by itself, which is split over the pipeline's stages as well. Returns ()
    for other letters, and where the axes do not divide `size`: then every device has all of it.
    """
    candidates = {
        "B": BATCH_AXES,
        "T": (TIME_AXIS,),
        "t": (TIME_AXIS, STAGE_AXIS),
        "W": (HEAD_AXIS,),
    }
    candidates |= dict.fromkeys("HGD", (HEAD_AXIS,))
    axes = tuple(axis for axis in candidates.get(letter, ()) if sizes().get(axis, 1) > 1)
    return axes if size % math.prod(sizes()[axis] for axis in axes) == 0 else ()


def constrain(x_BTD: Array) -> Array:
    """Returns activations x_BTD between layers, split over devices by rows and time only."""
    if not sizes():
        return x_BTD
    rows, time = axes_of("B", x_BTD.shape[0]), axes_of("T", x_BTD.shape[1])
    spec = PartitionSpec(rows or None, time or None)
    return jax.lax.with_sharding_constraint(x_BTD, spec)


def constrain_stages(x_SBTD: Array) -> Array:
    """Returns the activations of all pipeline stages, split by stage, rows and time."""
    rows, time = axes_of("B", x_SBTD.shape[1]), axes_of("T", x_SBTD.shape[2])
    spec = PartitionSpec(STAGE_AXIS, rows or None, time or None)
    return jax.lax.with_sharding_constraint(x_SBTD, spec)


def stages() -> int:
    """Returns the number of pipeline stages on the mesh in scope."""
    return sizes().get(STAGE_AXIS, 1)


def shardings(mesh: Mesh, boxed_tree: Any, zero: bool = False, memory_kind=None) -> Any:
    """Returns a NamedSharding for every leaf of a tree of boxed arrays, by RULES.

    boxed_tree: parameters from `Module.init`, boxed with logical axis names, or an optimizer state
      made from them. Arrays without names are replicated.
    zero: whether the model width is split over COPY_AXES too, as ZeRO does.
    memory_kind: the devices' memory, such as "pinned_host"; None is the default one.

    Raises:
      ValueError: a dimension is not divisible by the mesh axes that split it; the message names the
        leaf and the numbers.
    """
    rules = RULES
    if zero:
        copies = tuple(axis for axis in COPY_AXES if mesh.shape[axis] > 1)
        rules = (("embed", ("fsdp", *copies)), *RULES)

    def sharding(path, leaf):
        names = leaf.names if layers.is_boxed(leaf) else ()
        spec = spmd.logical_to_mesh_axes(names, rules) or PartitionSpec()

        def of_array(array):
            for dimension, axes in zip(array.shape, spec):
                ways = _ways(mesh, axes)
                if dimension % ways:
                    raise ValueError(
                        f"parameter {jax.tree_util.keystr(path)} of shape {array.shape} cannot be "
                        f"split: {dimension} is not divisible by {ways} "
                        f"({_named_ways(mesh, axes)} in the mesh)"
                    )
            return NamedSharding(mesh, spec, memory_kind=memory_kind)

        # An optimizer of several parts has boxes without arrays for what other parts update.
        return jax.tree.map(of_array, nn.meta.unbox(leaf))

    return jax.tree_util.tree_map_with_path(sharding, boxed_tree, is_leaf=layers.is_boxed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches (B, T): rows over `data` and `fsdp`, time over `seq`."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole array on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())


class Placement:
    """Where a run's parameters, gradients and optimizer state lie, by ZeRO stage and offloading.

    A training step calls `reduce` and `update`, which keep them there.

    params, grads: trees of NamedShardings, one for each parameter and each gradient.
    boxed_params: the parameters as `Module.init` returns them, which may be abstract.

    Raises:
      ValueError: a parameter that the mesh axes do not divide, or `options.offload` where the
        devices have no pinned host memory.
    """

    def __init__(self, mesh: Mesh, options: Options, boxed_params: Any):
        self.mesh, self.options = mesh, options
        self.params = shardings(mesh, boxed_params, zero=options.zero >= 3)
        self.grads = shardings(mesh, boxed_params, zero=options.zero >= 2)
        self._host = _pinned_host(mesh) if options.offload else None
        self._host_params = shardings(mesh, boxed_params, options.zero >= 1, self._host)

    def scope(self):
        """Context manager: code that is traced inside runs on this mesh with these options."""
        return scope(self.mesh, self.options)

    def optimizer(self, boxed_opt_state: Any) -> Any:
        """Returns a tree of NamedShardings for the optimizer state, given with boxed arrays."""
        return shardings(self.mesh, boxed_opt_state, self.options.zero >= 1, self._host)

    def reduce(self, grads: Any) -> Any:
        """Returns gradients constrained to their sharding; from ZeRO stage 2 on they are split.

        The compiler sums them over devices accordingly, by reduce-scatter or all-reduce.
        """
        return jax.lax.with_sharding_constraint(grads, self.grads)

    def update(self, update: Callable, grads, opt_state, params) -> tuple[Any, Any]:
        """Returns (updates, new optimizer state) of an optimizer's function `update`.

        It calls update(grads, opt_state, params), on the host where the state is offloaded.
        """
        if self._host is None:
            return update(grads, opt_state, params)
        grads, params = (jax.device_put(tree, self._host_params) for tree in (grads, params))
        updates, opt_state = _on_host(update)(grads, opt_state, params)
        on_devices = jax.tree.map(lambda s: s.with_memory_kind("device"), self.params)
        return jax.device_put(updates, on_devices), opt_state

    def on_devices(self, opt_state: Any, boxed_opt_state: Any) -> Any:
        """Returns the optimizer state, moved to the devices' memory where it is offloaded."""
        if self._host is None:
            return opt_state
        zero = self.options.zero >= 1
        return jax.device_put(opt_state, shardings(self.mesh, boxed_opt_state, zero, "device"))


def _on_host(function: Callable) -> Callable:
    # compute_on2 of JAX 0.10 is compute_on of 0.12.
    compute: Callable = getattr(compute_on, "compute_on2", compute_on.compute_on)
    return compute(function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)


def check_batch(
    mesh: Mesh, batch_size: int, seq_len: int, options: Options | None = None, accumulate: int = 1
) -> None:
    """Raises ValueError, with the numbers, if a batch cannot be split evenly for training.

    Rows are split by `accumulate` steps of gradient accumulation, the pipeline's microbatches and
    the mesh; time is split by the mesh.
    """
    stages = mesh.shape[STAGE_AXIS]
    pieces = ((options and options.microbatches) or stages) if stages > 1 else 1
    for name, count in (("train.accumulate", accumulate), ("parallel.microbatches", pieces)):
        if batch_size % count:
            raise ValueError(f"{batch_size} rows are not divisible by {name}, which is {count}")
        batch_size //= count
    for size, axes, what in zip((batch_size, seq_len), BATCH_SPEC, ("batch_size", "seq_len")):
        ways = _ways(mesh, axes)
        if size % ways:
            raise ValueError(
                f"{what} {size} is not divisible by {ways} "
                f"({_named_ways(mesh, axes)} in the mesh): use a multiple of {ways} or a smaller mesh"
            )


def _pinned_host(mesh: Mesh) -> str:
    kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
    if "pinned_host" not in kinds:
        raise ValueError(
            "parallel.offload needs memory of kind 'pinned_host'; "
            f"{mesh.devices.flat[0].device_kind} has {', '.join(kinds)}"
        )
    return "pinned_host"


def _ways(mesh: Mesh, axes) -> int:
    return math.prod(mesh.shape[axis] for axis in _tuple(axes))


def _named_ways(mesh: Mesh, axes) -> str:
    return " * ".join(f"{axis}={mesh.shape[axis]}" for axis in _tuple(axes))


def _tuple(axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
