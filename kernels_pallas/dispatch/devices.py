"""The device that a call is being traced for, and whether kernels may run interpreted on a CPU.

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
    """A device to trace for.

    platform: 'cpu', 'tpu' or 'gpu'. kind: the device's own name, such as 'TPU v6 lite' or
    'NVIDIA H200'.
    """

    platform: str
    kind: str


def current() -> Target:
    """Returns the abstract device in scope; where there is none, `jax.default_device`'s; else the
    process's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = _CONFIG.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return Target(platform_of(device), device.device_kind)


def platform_of(device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def committed(arrays) -> Any:
    """Returns the device that an array is committed to, as `jax.device_put(x, device)` leaves it.

    None where there is no such array, or where an abstract device is in scope. Inside jit nothing
    is known of where its arguments will lie: there `jax.default_device` has to name a device of
    another platform than the process's first.
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
    """Sets the target, inside the block, to the device an array is committed to, if its platform
    differs from the current target's; yields whether it does."""
    device = committed(arrays)
    if device is None or platform_of(device) == current().platform:
        yield False
    else:
        with jax.default_device(device):
            yield True


def compute_capability() -> float | None:
    """Returns the compute capability, such as 9.0, of the GPU being traced for; None if it is not
    one of this process's."""
    device = jax.devices()[0]
    found = getattr(device, "compute_capability", None)
    return float(found) if found and device.device_kind == current().kind else None


@contextlib.contextmanager
def interpreted(on: bool = True):
    """Lets kernels that are traced inside the block run interpreted, where the target is a CPU."""
    token = _INTERPRETED.set(on)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreting() -> bool:
    """Returns whether a kernel that is traced now is to be interpreted."""
    return _INTERPRETED.get() and current().platform == "cpu"
