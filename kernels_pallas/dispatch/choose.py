"""Choosing an implementation of an operator: the one that was named, or the best that can run the
call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas.dispatch import devices, manual_axes, verification


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    name: what a caller writes in `implementation=`.
    call: the function, with the operator's normalised arguments.
    unsupported_reason: given the call's keyword arguments, why it cannot run, or None if it can.
    platform: the one it is a kernel for, 'tpu' or 'gpu'; None runs anywhere.
    """

    name: str
    call: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = lambda **arguments: None
    platform: str | None = None

    def reason_against(self, arguments) -> str | None:
        """Why this call cannot run on the current target, or None."""
        target = devices.current()
        if self.platform not in (None, target.platform):
            return f"it is a kernel for {self.platform}; this is {target.platform}"
        if self.platform == "tpu" and jax.config.jax_enable_x64:
            return (
                "jax_enable_x64 is on, and Mosaic's compiler takes no 64-bit indices (it may end "
                "the process); turn it off, or take a form that is no kernel"
            )
        return self.unsupported_reason(**arguments)


def choose(
    operator: str, implementations: Sequence[Implementation], name: str | None, **arguments
) -> Implementation:
    """Returns the implementation called `name`, or for None the first of the list that supports the
    call.

    A named implementation that cannot run raises and says why; nothing is swapped in silence. For
    None, a kernel serves once it has passed its check on this kind of device (`first_use`); a named
    one is not checked.

    Arrays that are committed to another platform than the process's first are computed there.

    Raises:
      ValueError: the name is unknown (the choices are listed).
      NotImplementedError: the named implementation does not support this call, or none does (with
        the reasons).
    """
    device = devices.committed(jax.tree.leaves(arguments))
    if device is None or devices.platform_of(device) == devices.current().platform:
        return _choose(operator, implementations, name, arguments)
    with jax.default_device(device):
        chosen = _choose(operator, implementations, name, arguments)

    def call(*args, **keywords):
        with jax.default_device(device):
            return chosen.call(*args, **keywords)

    return dataclasses.replace(chosen, call=call)


def _choose(operator, implementations, name, arguments) -> Implementation:
    if name is None:
        reasons = []
        for implementation in implementations:
            reason = implementation.reason_against(arguments)
            if reason is None and implementation.platform is not None:
                reason = verification.unverified_reason(operator, implementation.name, arguments)
            if reason is None:
                return implementation
            reasons.append(f"{implementation.name}: {reason}")
        raise NotImplementedError(
            f"{operator}: no implementation supports this call ({'; '.join(reasons)})"
        )
    for implementation in implementations:
        if implementation.name == name:
            if devices.interpreting():
                reason = implementation.unsupported_reason(**arguments)
            else:
                reason = implementation.reason_against(arguments)
            if reason:
                raise NotImplementedError(
                    f"{operator}: implementation {name!r} cannot run here: {reason}"
                )
            return implementation
    choices = ", ".join(repr(implementation.name) for implementation in implementations)
    raise ValueError(
        f"{operator}: unknown implementation {name!r}; choose one of {choices}, or None"
    )


def run(
    operator: str, implementations: Sequence[Implementation], name: str | None, **arguments
) -> Any:
    """Calls what `choose` returns, with its arrays of one type under `jax.shard_map` (see
    `manual_axes`).
    """
    arguments = manual_axes.alike(arguments)
    return choose(operator, implementations, name, **arguments).call(**arguments)
