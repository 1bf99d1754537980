"""The target, which is the device that a call is traced for, and whether kernels run interpreted.

A kernel is written for one platform, 'tpu' or 'gpu'. It may be traced on a host that has neither:
inside `jax.sharding.use_abstract_mesh` of a mesh with an abstract device, that device is the
target. `with interpreted():` lets a kernel that is named in `implementation=` run on the CPU
through its interpreter, far too slowly for anything but tests.
"""

import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
from jax import core

_CONFIG: Any = jax.config  # flags are attributes that its type does not list

_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


class Target(NamedTuple):
    """The device that a call is traced for.

    platform: 'cpu', 'tpu' or 'gpu'. kind: the device's own name, such as 'TPU v6 lite' or 'NVIDIA
      H200'.
    """

    platform: str
    kind: str


def current() -> Target:
    """Returns the target: an abstract device in scope, `jax.default_device`, or the first one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = _CONFIG.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return Target(platform_of(device), device.device_kind)


def platform_of(device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def committed(arrays) -> Any:
    """Returns the device that one of the arrays is committed to, as by `jax.device_put(x, device)`.

    None where no array is, or where an abstract device is in scope. Inside jit it is not known
    where the arguments will lie: there `jax.default_device` has to name a device of another
    platform than the process's first.
    """
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    for x in arrays:
        while isinstance(x, core.Tracer) and hasattr(x, "primal"):
            x = x.primal  # of what is being differentiated
        if isinstance(x, jax.Array) and not isinstance(x, core.Tracer) and x.committed:
            return min(x.devices(), key=lambda device: device.id)
    return None


@contextlib.contextmanager
def of(arrays):
    """Context manager: inside, the target is the device that one of `arrays` is committed to.

    The target changes only if that device is of another platform; yields whether it does.
    """
    device = committed(arrays)
    if device is None or platform_of(device) == current().platform:
        yield False
    else:
        with jax.default_device(device):
            yield True


def compute_capability() -> float | None:
    """Returns the compute capability, such as 9.0, of the target GPU; None if it is not at hand."""
    device = jax.devices()[0]
    found = getattr(device, "compute_capability", None)
    return float(found) if found and device.device_kind == current().kind else None


@contextlib.contextmanager
def interpreted(on: bool = True):
    """Context manager: lets kernels traced in its block run interpreted, if the target is a CPU."""
    token = _INTERPRETED.set(on)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreting() -> bool:
    """Returns whether a kernel that is traced now has to run in an interpreter."""
    return _INTERPRETED.get() and current().platform == "cpu"
