"""Rules that turn tensors of a checkpoint into our parameters, and exactly back.

Tensors have dotted names, "model.layers.3.self_attn.q_proj.weight". Parameters have paths with the
layer's own number, "block_3/mixer/q/kernel", wherever the layer stands in a scan. A rule moves
numbers between NumPy arrays and does not compute with them, so that a file comes out as it went
in. Where a layout computes (norms whose gain is 1 + weight), our module has an option for it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A conversion of the tensors called `names` into our parameters at `paths`, and back.

    into: arrays in the order of `names` to arrays in that of `paths`. out: the inverse of `into`.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    into: Callable[..., Arrays]
    out: Callable[..., Arrays]

    def without(self, prefix: str) -> "Rule":
        """Returns the rule with `prefix` removed from its tensors' names."""
        names = tuple(name.removeprefix(prefix) for name in self.names)
        return dataclasses.replace(self, names=names)


class Move(NamedTuple):
    """An invertible function of one array, such as a transpose; `out` is the inverse of `into`."""

    into: Callable[[np.ndarray], np.ndarray]
    out: Callable[[np.ndarray], np.ndarray]


AS_IS = Move(lambda x: x, lambda x: x)
# nn.Linear's weight (output, input) is our kernel (input, output).
LINEAR = Move(lambda x: x.T, lambda x: x.T)
# A depthwise nn.Conv1d's weight (channels, 1, taps) is ShortConv's kernel (taps, channels).
CONV1D = Move(lambda x: x.squeeze(1).T, lambda x: x.T[:, None])


def moved(name: str, path: str, move: Move) -> Rule:
    """Returns a rule that makes tensor `name` the parameter at `path` by a Move."""
    return Rule((name,), (path,), lambda x: (move.into(x),), lambda x: (move.out(x),))


def same(name: str, path: str) -> Rule:
    """Returns a rule that copies tensor `name` to the parameter at `path`."""
    return moved(name, path, AS_IS)


def transposed(name: str, path: str) -> Rule:
    """Returns a rule that makes the transpose of matrix `name` the parameter at `path`."""
    return moved(name, path, LINEAR)


def linear(name: str, path: str, bias: bool = False, move: Move = LINEAR) -> Iterator[Rule]:
    """Yields rules that turn an nn.Linear into our nn.Dense; bias: whether it has one.

    move: another Move for the weight, such as CONV1D, if `name` is another module.
    """
    yield moved(f"{name}.weight", f"{path}/kernel", move)
    if bias:
        yield same(f"{name}.bias", f"{path}/bias")


def split(
    name: str, paths: Sequence[str], widths: Sequence[int], move: Move = AS_IS, axis: int = 0
) -> Rule:
    """Returns a rule that cuts tensor `name` along `axis` into the parameters at `paths`.

    widths: their sizes along this axis. move: a Move applied to each after the cut.
    """
    ends = np.cumsum(widths)[:-1]

    def into(x):
        return [move.into(part) for part in np.split(x, ends, axis)]

    def out(*parts):
        return (np.concatenate([move.out(part) for part in parts], axis),)

    return Rule((name,), tuple(paths), into, out)


def packed(
    name: str, ours: str, widths: dict[str, int], bias: bool = False, move: Move = LINEAR
) -> Iterator[Rule]:
    """Yields rules that cut one nn.Linear `name` along its output features into our projections.

    widths: {our projection: its number of output features}; paths are `{ours}/{projection}`.
    """
    paths, sizes = [f"{ours}/{own}" for own in widths], list(widths.values())
    yield split(f"{name}.weight", [f"{path}/kernel" for path in paths], sizes, move)
    if bias:
        yield split(f"{name}.bias", [f"{path}/bias" for path in paths], sizes)
