"""Checks the values of a config against the types of a dataclass's fields."""

import types
import typing
from typing import Any

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple",
}


def checked(name: str, value: Any, kind: Any) -> Any:
    """Returns the value of a config's field, checked to be of type `kind`.

    A list, which is JSON's form of a tuple, is returned as a tuple.

    Args:
      name: the field's name, for the error message.
      kind: int, float (integers are accepted), bool, str, a tuple of these, a union, or Any.

    Raises:
      ValueError: a value of another type; the message says what is expected.
    """
    if not _is(value, kind):
        raise ValueError(f"{name} is {value!r}; expected {expected(kind)}")
    return tuple(value) if isinstance(value, list) else value


def expected(kind: Any) -> str:
    """Returns the name of a type for an error message, such as "an integer or None"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(expected, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is Ellipsis:
            return f"a tuple of {expected(parts[0]).removeprefix('an ').removeprefix('a ')}s"
        return f"({', '.join(map(expected, parts))})"
    return _WORDS.get(kind, "None")


def _is(value, kind) -> bool:
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is(value, part) for part in parts)
    if parts and parts[-1] is Ellipsis:
        return isinstance(value, (tuple, list)) and all(_is(v, parts[0]) for v in value)
    if parts:
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(parts)
            and all(map(_is, value, parts))
        )
    return kind in (Any, type(value)) or (kind is float and type(value) is int)
