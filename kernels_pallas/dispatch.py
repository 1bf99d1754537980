"""Choosing an implementation of an operator: the one that was named, or the best that can run the call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas import first_use, manual_axes, targets


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    name: what a caller writes in `implementation=`.
    call: the function, with the operator's normalised arguments.
    unsupported: given the call's keyword arguments, why it cannot run, or None if it can.
    platform: the one it is a kernel for, 'tpu' or 'gpu'; None runs anywhere.
    """

    name: str
    call: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda **arguments: None
    platform: str | None = None

    def why_not(self, arguments) -> str | None:
        """Why this call cannot run on the current target, or None."""
        target = targets.current()
        if self.platform not in (None, target.platform):
            return f"it is a kernel for {self.platform}; this is {target.platform}"
        return self.unsupported(**arguments)


def choose(
    operator: str, implementations: Sequence[Implementation], name: str | None, **arguments
) -> Implementation:
    """Returns the implementation called `name`, or for None the first of the list that supports the call.

    A named implementation that cannot run raises and says why; nothing is swapped in silence. For None, a kernel serves
    once it has passed its check on this kind of device (`first_use`); a named one is not checked.

    Raises:
      ValueError: the name is unknown (the choices are listed).
      NotImplementedError: the named implementation does not support this call, or none does (with the reasons).
    """
    if name is None:
        reasons = []
        for implementation in implementations:
            reason = implementation.why_not(arguments)
            if reason is None and implementation.platform is not None:
                reason = first_use.why_not(operator, implementation.name, arguments)
            if reason is None:
                return implementation
            reasons.append(f"{implementation.name}: {reason}")
        raise NotImplementedError(
            f"{operator}: no implementation supports this call ({'; '.join(reasons)})"
        )
    for implementation in implementations:
        if implementation.name == name:
            if targets.interpreting():
                reason = implementation.unsupported(**arguments)
            else:
                reason = implementation.why_not(arguments)
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
