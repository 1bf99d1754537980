"""Rules by which tensors of a checkpoint become our parameters, and exactly the reverse.

Tensors have dotted names, "model.layers.3.self_attn.q_proj.weight". Parameters have paths with the
layer's own number, "block_3/mixer/q/kernel", wherever the layer stands in a scan. A rule moves
numbers between NumPy arrays and does not compute with them, so that a file comes out as it went
in. Where a layout computes (norms whose gain is 1 + weight), our module has an option for it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Turns the tensors called `names` into the parameters at `paths`.

    into: arrays in the order of `names` to arrays in the order of `paths`. out: the inverse.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    into: Callable[..., Arrays]
    out: Callable[..., Arrays]


def same(name: str, path: str) -> Rule:
    """Takes one tensor as it is."""
    return Rule((name,), (path,), lambda x: (x,), lambda x: (x,))


def transposed(name: str, path: str) -> Rule:
    """Transposes: nn.Linear's weight (output, input) is our kernel (input, output)."""
    return moved(name, path, lambda x: x.T, lambda x: x.T)


def moved(name: str, path: str, into: Callable, out: Callable) -> Rule:
    """Passes one tensor through a function and its inverse."""
    return Rule((name,), (path,), lambda x: (into(x),), lambda x: (out(x),))


def linear(name: str, path: str, bias: bool = False) -> Iterator[Rule]:
    """Turns PyTorch's nn.Linear into Flax's nn.Dense."""
    yield transposed(f"{name}.weight", f"{path}/kernel")
    if bias:
        yield same(f"{name}.bias", f"{path}/bias")


def conv1d(name: str, path: str, bias: bool = False) -> Iterator[Rule]:
    """Turns a depthwise nn.Conv1d, weight (channels, 1, taps), into our ShortConv, kernel (taps,
    channels)."""
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
    """Cuts a tensor's `axis` into consecutive parts of these widths, each, transposed unless told
    otherwise, a parameter of ours."""
    ends = np.cumsum(widths)[:-1]

    def into(x):
        return [part.T if transpose else part for part in np.split(x, ends, axis)]

    def out(*parts):
        return (np.concatenate([part.T if transpose else part for part in parts], axis),)

    return Rule((name,), tuple(paths), into, out)
