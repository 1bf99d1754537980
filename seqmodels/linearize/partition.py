"""Splits parameter trees in two by patterns on their paths, and merges them again."""

import re
from collections.abc import Callable
from typing import Any

from flax import traverse_util

from seqmodels.modules.layers import is_boxed

SEPARATOR = "/"


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter tree as {path: leaf}, with paths such as "embed/embedding".

    Boxed leaves stay boxed.
    """
    return traverse_util.flatten_dict(tree, sep=SEPARATOR, is_leaf=lambda _, leaf: is_boxed(leaf))


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep=SEPARATOR)


def matches(pattern: str) -> Callable[[str], bool]:
    """Returns a function that says whether the regular expression `pattern` occurs in a path.

    An empty pattern occurs in no path. Raises ValueError for an invalid regular expression.
    """
    if not pattern:
        return lambda path: False
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return lambda path: compiled.search(path) is not None


def split(tree: dict[str, Any], chosen: Callable[[str], bool]) -> tuple[dict, dict]:
    """Splits a parameter tree into (leaves whose path is chosen, all others), as two trees.

    chosen: whether a path such as "embed/embedding" is chosen. The trees have no empty branches.
    """
    flat = flatten(tree)
    picked = {path: leaf for path, leaf in flat.items() if chosen(path)}
    others = {path: leaf for path, leaf in flat.items() if path not in picked}
    return unflatten(picked), unflatten(others)


def merge(*trees: dict[str, Any]) -> dict[str, Any]:
    """Merges parameter trees into one; where several trees have a leaf, takes the last tree's."""
    flat = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def require(tree: dict[str, Any], pattern: str, what: str) -> None:
    """Raises ValueError if a non-empty pattern matches no path of a parameter tree.

    The message begins with `what` and lists some of the paths.
    """
    paths = sorted(flatten(tree))
    if pattern and not any(map(matches(pattern), paths)):
        some = ", ".join(paths[:: max(1, len(paths) // 8)][:8])
        raise ValueError(f"{what}: pattern {pattern!r} matches no parameter; there are {some}, ...")
