"""Choosing an implementation of an operator: the one that was named, or the best that can run the call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    name: what a caller writes in `implementation=`.
    call: the function, with the operator's normalised arguments.
    unsupported: given the platform and the call's keyword arguments, why it cannot run, or None if it can.
    """

    name: str
    call: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda platform, **arguments: None


def choose(
    operator: str, implementations: Sequence[Implementation], name: str | None, **arguments
) -> Implementation:
    """Returns the implementation called `name`, or for None the first of the list that supports the call.

    A named implementation that cannot run raises and says why; nothing is swapped in silence.

    Raises:
      ValueError: the name is unknown (the choices are listed).
      NotImplementedError: the named implementation does not support this call, or none does (with the reasons).
    """
    platform = jax.default_backend()
    if name is None:
        reasons = []
        for implementation in implementations:
            reason = implementation.unsupported(platform, **arguments)
            if reason is None:
                return implementation
            reasons.append(f"{implementation.name}: {reason}")
        raise NotImplementedError(
            f"{operator}: no implementation supports this call on {platform} ({'; '.join(reasons)})"
        )
    for implementation in implementations:
        if implementation.name == name:
            if reason := implementation.unsupported(platform, **arguments):
                raise NotImplementedError(
                    f"{operator}: implementation {name!r} cannot run here: {reason}"
                )
            return implementation
    choices = ", ".join(repr(implementation.name) for implementation in implementations)
    raise ValueError(
        f"{operator}: unknown implementation {name!r}; choose one of {choices}, or None"
    )
