"""Descriptions of operators, for self-check, benchmarks and conformance suite to read.

Each operator has one, `CASE` in `ops/<operator>/case.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an operator's inputs: B batch, T time, H value heads, K key dim, V value dim.

    G: key heads; None is H. D: channels of operators without heads; None is H V. I: taps of a
      convolution. window: the tokens that a query sees, where the kind of call has a window.
    """

    B: int = 1
    T: int = 300
    H: int = 4
    G: int | None = None
    K: int = 64
    V: int = 64
    # Not in the repr, from which the conformance suite draws its seeds.
    D: int | None = dataclasses.field(default=None, repr=False)
    I: int = dataclasses.field(default=4, repr=False)
    window: int = dataclasses.field(default=256, repr=False)

    @property
    def key_heads(self) -> int:
        return self.G or self.H

    @property
    def width(self) -> int:
        return self.D or self.H * self.V


@dataclasses.dataclass(frozen=True)
class OperatorCase:
    """Description of an operator: arguments, test inputs, and the kinds of call with own kernels.

    positional: names of the inputs that are given by position, in their order. The others are given
      by keyword, under their names.
    inputs: (rng, shape, regime) -> float32 or complex64 arrays by name. A regime is a kind of call
      and a distribution in one string. Two distributions exist for every kind: "<kind> check" of
      the self-check, and "<kind> trained", close to what trained models give, of the benchmarks.
    kinds: the kinds of call that differ in the kernels that serve them, the dtype aside.
    kind_of: the normalised arguments of a call, as an implementation gets them -> its kind, and the
      dtype of the check that covers it.
    options: (kind or regime, shape) -> the keywords that make a call be of that kind.
    further_calls: (kind, shape) -> {suffix: keywords}, the calls that the self-check makes beside
      the plain one; the suffix is added to the names of their results.
    packed: kind -> whether the self-check calls it with segment ids.
    regimes: the regimes that the conformance suite tests.
    rounded: the inputs that take the dtype asked for. The others (states, gates) stay float32.
    unbatched: the inputs of rank 2 or more without a batch axis.
    letters: the sizes of `Shape` that the operator has.
    truth: the implementation that kernels are compared with.
    float16: the kernels that take float16, beside float32 and bfloat16.
    """

    positional: tuple[str, ...]
    inputs: Callable[[np.random.Generator, Shape, str], Arrays]
    kinds: tuple[str, ...]
    kind_of: Callable[..., tuple[str, str]]
    regimes: tuple[str, ...]
    rounded: tuple[str, ...]
    letters: str
    options: Callable[[str, Shape], Arrays] = lambda kind, shape: {}
    further_calls: Callable[[str, Shape], dict[str, Arrays]] = lambda kind, shape: {}
    packed: Callable[[str], bool] = lambda kind: False
    unbatched: tuple[str, ...] = ()
    truth: str = "chunked"
    float16: tuple[str, ...] = ()

    def call(self, function: Callable, inputs: Arrays, **keywords) -> Arrays:
        """Calls an operator's public function on inputs by name.

        Returns its results by name: "output" and, if it returns a state, "final state".
        """
        others = dict(inputs)
        given = [others.pop(name, None) for name in self.positional]
        results = function(*given, **others, **keywords)
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip(("output", "final state"), results))


def checked_dtype(*arrays: jax.Array) -> str:
    """Returns the dtype of the self-check that covers a call with these arrays.

    It is float32 if one array is, bfloat16 if all are, else float16.
    """
    dtypes = {str(x.dtype) for x in arrays}
    if "float32" in dtypes:
        return "float32"
    return "bfloat16" if dtypes == {"bfloat16"} else "float16"
