"""How tensors of a checkpoint and our parameters become each other: one rule serves both
directions, exactly.

Their tensors have dotted names, "model.layers.3.self_attn.q_proj.weight". Our parameters have paths
with the layer's own number, "block_3/mixer/q/kernel", wherever the layer stands in a scan. A rule's
functions take and return NumPy arrays and move numbers about; they do not compute with them, so
that a file comes out as it went in. Where a layout computes (norms whose gain is 1 + weight), the
module has an option for it instead.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensors called `names` <-> the parameters at `paths`.

    into: their arrays, in the order of `names`, to ours in that of `paths`. out: the inverse.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    into: Callable[..., Arrays]
    out: Callable[..., Arrays]


def same(name: str, path: str) -> Rule:
    """One tensor as it is."""
    return Rule((name,), (path,), lambda x: (x,), lambda x: (x,))


def transposed(name: str, path: str) -> Rule:
    """A matrix with its axes exchanged: nn.Linear's weight (output, input) is our kernel (input,
    output)."""
    return moved(name, path, lambda x: x.T, lambda x: x.T)


def moved(name: str, path: str, into: Callable, out: Callable) -> Rule:
    """One tensor through any function and its inverse."""
    return Rule((name,), (path,), lambda x: (into(x),), lambda x: (out(x),))


def linear(name: str, path: str, bias: bool = False) -> Iterator[Rule]:
    """nn.Linear as nn.Dense."""
    yield transposed(f"{name}.weight", f"{path}/kernel")
    if bias:
        yield same(f"{name}.bias", f"{path}/bias")


def conv1d(name: str, path: str, bias: bool = False) -> Iterator[Rule]:
    """A depthwise nn.Conv1d, weight (channels, 1, taps), as our ShortConv, kernel (taps, channels)."""
    yield moved(
        f"{name}.weight", f"{path}/kernel", lambda x: x.squeeze(1).T, lambda x: x.T[:, None]
    )
    if bias:
        yield same(f"{name}.bias", f"{path}/bias")


def split(
    name: str,
    paths: Sequence[str],
    widths: Sequence[int],
    transpose: bool = True,
    axis: int = 0,
) -> Rule:
    """One tensor whose `axis` is cut into consecutive parts of these widths, each (transposed) a
    parameter of ours."""
    ends = np.cumsum(widths)[:-1]

    def into(x):
        return [part.T if transpose else part for part in np.split(x, ends, axis)]

    def out(*parts):
        return (np.concatenate([part.T if transpose else part for part in parts], axis),)

    return Rule((name,), tuple(paths), into, out)
