"""Patterns such as "3*gated_delta_net + attention(window=256)", which give each layer a mixer."""

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

_MOST_LAYERS = 100_000


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """Fields of one layer in a pattern: its mixer's registered name and its options, hashable."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


def parse(pattern: str) -> tuple[MixerSpec, ...]:
    """Returns a MixerSpec for each layer of a pattern such as "3*gla + attention(window=64)".

    Layers are joined by +, options stand in parentheses, and `n*` repeats a layer or a group:
    "2*(gla + attention)" is gla, attention, gla, attention.

    Raises:
      ValueError: a pattern of another form; the message shows what could not be read.
    """
    try:
        tree = ast.parse(pattern.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"pattern {pattern!r} cannot be read: {error.msg}") from error
    return _specs(tree, pattern)


def layers(pattern: str, num_layers: int) -> tuple[MixerSpec, ...]:
    """Returns `num_layers` MixerSpecs by repeating a pattern; the last repetition may be cut short.

    Raises ValueError for fewer than one layer or a pattern that `parse` cannot read.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 1")
    specs = parse(pattern)
    repeats = -(-num_layers // len(specs))
    return (specs * repeats)[:num_layers]


def to_text(specs: Sequence[MixerSpec]) -> str:
    """Returns a short pattern from which `layers(pattern, len(specs))` gives these specs."""
    specs = tuple(specs)
    L = len(specs)
    period = next(n for n in range(1, L + 1) if all(specs[i] == specs[i % n] for i in range(L)))
    runs = itertools.groupby(specs[:period])
    return " + ".join(_run_text(spec, len(list(run))) for spec, run in runs)


def _run_text(spec: MixerSpec, count: int) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in spec.options)
    return (f"{count}*" if count > 1 else "") + spec.name + (f"({options})" if options else "")


def _specs(node: ast.expr, pattern: str) -> tuple[MixerSpec, ...]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _specs(left, pattern) + _specs(right, pattern)
        case ast.BinOp(left=ast.Constant(value=int(count)), op=ast.Mult(), right=right) if (
            count > 0
        ):
            specs = _specs(right, pattern)
            if len(specs) * count > _MOST_LAYERS:
                raise ValueError(f"pattern {pattern[:80]!r} has more than {_MOST_LAYERS} layers")
            return specs * count
        case ast.Name(id=name):
            return (MixerSpec(name),)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if (
            all(k.arg for k in keywords)  # None stands for **options
        ):
            try:
                options = tuple((str(k.arg), ast.literal_eval(k.value)) for k in keywords)
            except ValueError as error:
                raise ValueError(
                    f"pattern {pattern!r}: the options of {name!r} must be plain values, "
                    f"as in {name}(window=256)"
                ) from error
            return (MixerSpec(name, options),)
    raise ValueError(
        f"pattern {pattern!r}: cannot read {ast.unparse(node)!r}; write it like "
        f"'3*gated_delta_net + attention(window=256)'"
    )


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """Fields of a stack of layers of which the middle is compiled once and scanned over.

    prefix, suffix: the layers before and after the scan. period: the layers that the scan repeats
      `repeats` times.
    """

    prefix: tuple[MixerSpec, ...]
    period: tuple[MixerSpec, ...]
    repeats: int
    suffix: tuple[MixerSpec, ...]


def scan_plan(specs: tuple[MixerSpec, ...]) -> ScanPlan:
    """Returns the ScanPlan of a stack that compiles the fewest layers.

    Where no layers repeat, all are in `prefix` and `repeats` is 0.
    """
    best, best_cost = ScanPlan(specs, (), 0, ()), len(specs)
    # The cost of a repetition is the number of blocks that are compiled with it.
    for start in range(len(specs)):
        for length in range(1, (len(specs) - start) // 2 + 1):
            period = specs[start : start + length]
            repeats = 1
            while specs[start + repeats * length : start + (repeats + 1) * length] == period:
                repeats += 1
            cost = len(specs) - (repeats - 1) * length
            if repeats > 1 and cost < best_cost:
                end = start + repeats * length
                best, best_cost = ScanPlan(specs[:start], period, repeats, specs[end:]), cost
    return best
