"""Choice of an operator's implementation: the one a call names, or the best that can run it."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kernels_pallas.dispatch import devices, manual_axes, verification
from kernels_pallas.dispatch.case import OperatorCase

_CONFIG: Any = jax.config  # flags are attributes that its type does not list

_RECORDED: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorded", default=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operator, such as its kernel for a TPU.

    name: the value of `implementation=` that asks for it.
    call: the function, on the operator's normalised arguments.
    unsupported_reason: maps the call's keyword arguments to the reason why it cannot run, or None.
    platform: 'tpu' or 'gpu' for a kernel; None runs anywhere.
    passed_over_reason: maps the same to the reason why it should serve only where it is named,
      although it can run, or None.
    """

    name: str
    call: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = lambda **arguments: None
    platform: str | None = None
    passed_over_reason: Callable[..., str | None] = lambda **arguments: None

    def reason_against(self, arguments) -> str | None:
        """Returns why the current target cannot run a call with these arguments, or None."""
        target = devices.current()
        if self.platform not in (None, target.platform):
            return f"it is a kernel for {self.platform}; this is {target.platform}"
        if self.platform == "tpu" and _CONFIG.jax_enable_x64:
            return (
                "jax_enable_x64 is on, and Mosaic's compiler takes no 64-bit indices (it may end "
                "the process); turn it off, or take a form that is no kernel"
            )
        return self.unsupported_reason(**arguments)


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator as dispatch, self-check, benchmarks and tests use it.

    function: its public function.
    implementations: the ways to compute it, the best first.
    case: how it is called and checked; None for an operator without kernels.
    """

    function: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    case: OperatorCase | None = None

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclasses.dataclass(frozen=True)
class Choice:
    """Result of a choice: the implementation that serves a kind of call.

    kind: what of the call matters, and the dtype, such as "per_token bfloat16"; empty for operators
      without kernels.
    passed_over: the better implementations, each with the reason why it does not serve.
    """

    operator: str
    kind: str
    implementation: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        others = "".join(f". Not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.operator}{kind}: {self.implementation}{others}"


@contextlib.contextmanager
def recorded():
    """Context manager: yields a list of the `Choice` of each operator traced in its block.

    It holds one per operator, kind of call and implementation. What JAX finds in its caches is not
    traced.
    """
    found: list[Choice] = []
    token = _RECORDED.set(found)
    try:
        yield found
    finally:
        _RECORDED.reset(token)


def explain(operator: Callable, *arguments, **keywords) -> Choice:
    """Returns which implementation serves a call here, and why each better one does not.

    `operator` is a public function, such as `kernels_pallas.delta_rule`, followed by its own
    arguments, arrays or `jax.ShapeDtypeStruct`. Nothing is computed, except that a kernel not yet
    checked on this kind of device is checked, as in a call.

        >>> q = k = v = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
        >>> beta = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
        >>> print(kernels_pallas.explain(kernels_pallas.delta_rule, q, k, v, beta))
        delta_rule (none bfloat16): chunked. Not one_token: it takes one token; got T = 4096. Not
        pallas_tpu: it is a kernel for tpu; this is cpu. Not triton: it is a kernel for gpu; this is
        cpu

    Raises:
      ValueError: the operator refuses the arguments, or chooses nothing (no tokens, no operator).
      NotImplementedError: the named implementation cannot run this call.
    """
    leaves, structure = jax.tree.flatten((arguments, keywords))
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, kinds)}

    def call(arrays):
        given = [arrays.get(i, x) for i, x in enumerate(leaves)]
        arguments, keywords = jax.tree.unflatten(structure, given)
        return operator(*arguments, **keywords)

    with devices.of(arrays.values()), recorded() as choices:
        jax.eval_shape(call, arrays)
    if not choices:
        raise ValueError(f"{operator.__name__}: nothing is chosen for these arguments")
    return choices[0]


def choose(operator: Operator, name: str | None, **arguments) -> Implementation:
    """Returns the implementation called `name`, or for None the first that supports the call.

    A named implementation that cannot run raises and says why; no other one replaces it. For None,
    a kernel serves once it has passed its check on this kind of device (`verification`); a named
    one is not checked.

    If arrays are committed to another platform than that of the process's first device, the call
    runs there.

    Raises:
      ValueError: the name is unknown (the choices are listed).
      NotImplementedError: the named implementation does not support this call, or none does (with
        the reasons).
    """
    leaves = jax.tree.leaves(arguments)
    with devices.of(leaves) as moved:
        chosen = _choose(operator, name, arguments)
    if not moved:
        return chosen

    def call(*args, **keywords):
        with devices.of(leaves):
            return chosen.call(*args, **keywords)

    return dataclasses.replace(chosen, call=call)


def _choose(operator, name, arguments) -> Implementation:
    names = [implementation.name for implementation in operator.implementations]
    if name is not None and name not in names:
        raise ValueError(
            f"{operator.name}: unknown implementation {name!r}; choose one of "
            f"{', '.join(map(repr, names))}, or None"
        )
    passed_over = {}
    for implementation in operator.implementations:
        if name is None:
            reason = _reason_against_unnamed(operator, implementation, arguments)
        elif name != implementation.name:
            reason = f"{name!r} was asked for"
        elif devices.interpreting():
            reason = implementation.unsupported_reason(**arguments)
        else:
            reason = implementation.reason_against(arguments)
        if reason is None:
            _record(operator, implementation, passed_over, arguments)
            return implementation
        if name == implementation.name:
            raise NotImplementedError(
                f"{operator.name}: implementation {name!r} cannot run here: {reason}"
            )
        passed_over[implementation.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise NotImplementedError(f"{operator.name}: no implementation supports this call ({reasons})")


def _reason_against_unnamed(operator, implementation, arguments) -> str | None:
    reason = implementation.reason_against(arguments)
    reason = reason or implementation.passed_over_reason(**arguments)
    if reason is None and implementation.platform is not None:
        reason = verification.unverified_reason(operator, implementation.name, arguments)
    return reason


def _record(operator, implementation, passed_over, arguments) -> None:
    found = _RECORDED.get()
    if found is None:
        return
    kind = " ".join(operator.case.kind_of(**arguments)) if operator.case else ""
    known = ((x.operator, x.kind, x.implementation) for x in found)
    if (operator.name, kind, implementation.name) not in known:
        found.append(Choice(operator.name, kind, implementation.name, passed_over))


def run(operator: Operator, name: str | None, **arguments) -> Any:
    """Chooses an operator's implementation by `choose`, calls it and returns its results.

    Under `jax.shard_map` all arrays first come to vary over the same mesh axes (`manual_axes`).
    """
    arguments = manual_axes.alike(arguments)
    return choose(operator, name, **arguments).call(**arguments)
