"""Splits a language model's parameters into a list of layers, and joins them again.

A `LanguageModel` stacks repeated layers along a first axis and holds the others by themselves, as
its `plan` says. Models of other patterns stack the same layers differently, so a teacher's
parameters reach its student through this list.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.modules.layers import is_boxed

SCANNED = "blocks"


def split(model, params: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Splits a model's parameters into (those outside of layers, a list with a tree per layer).

    The former are such as the embedding. Leaves may be abstract or boxed with logical axis names;
    the axis "layers" of stacked layers is removed.
    """
    plan, params = model.plan, dict(params)
    period, first = len(plan.period), len(plan.prefix)
    scanned = params.pop(SCANNED, {})
    layers = []
    for index in range(len(model.mixers)):
        repeat, place = divmod(index - first, period) if period else (-1, 0)
        if 0 <= repeat < plan.repeats:
            group = scanned[f"block_{place}"]
            layers.append(_map(lambda leaf, i=repeat: leaf[i], lambda names: names[1:], group))
        else:
            layers.append(params.pop(f"block_{index}"))
    return params, layers


def join(model, shared: dict[str, Any], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins parameters outside of layers and a list of layers' trees to parameters of `model`.

    Layers that the model scans over are stacked. This inverts `split`.
    """
    plan, params = model.plan, dict(shared)
    period, first = len(plan.period), len(plan.prefix)
    end = first + plan.repeats * period
    params |= {f"block_{i}": layers[i] for i in range(len(layers)) if not first <= i < end}

    def stack(*leaves):
        return jnp.stack(leaves)

    def stacked(names):
        return "layers", *names

    if plan.repeats:
        params[SCANNED] = {
            f"block_{place}": _map(stack, stacked, *layers[first + place : end : period])
            for place in range(period)
        }
    return params


def _map(function, rename, *trees):
    """Returns the tree of function(leaves of `trees`), for arrays, abstract arrays and boxes alike.

    rename: (axis names of a box) -> those of the result.
    """

    def apply(*leaves):
        first = leaves[0]
        if is_boxed(first):
            value = apply(*(leaf.unbox() for leaf in leaves))
            return first.replace(value=value, names=rename(first.names))
        abstract = isinstance(first, jax.ShapeDtypeStruct)
        return jax.eval_shape(function, *leaves) if abstract else function(*leaves)

    return jax.tree.map(apply, *trees, is_leaf=is_boxed)
