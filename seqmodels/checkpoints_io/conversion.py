"""Converts a checkpoint's tensors to parameters by an architecture's rules, and back, as a stream:
only one rule's tensors are in memory."""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from seqmodels.checkpoints_io.files import Source, TensorEntry
from seqmodels.checkpoints_io.rules import Rule
from seqmodels.language_model import LanguageModel

Params = dict[str, Any]
_WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MOST_LISTED = 20
_OUTPUT = "lm_head.weight"  # files of tied models often have a copy of the embedding under it


@functools.lru_cache(maxsize=16)
def abstract_params(model: LanguageModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path, such as "embed/embedding": shape and dtype} of a model's parameters."""
    return _flat(nn.meta.unbox(boxed_params(model)))


@functools.lru_cache(maxsize=4)
def float32_paths(model: LanguageModel) -> frozenset[str]:
    """Returns the paths of parameters that are float32 whatever `param_dtype` is: decays, gates,
    routers and feature maps, but not norms."""
    narrow = model.clone(param_dtype=jnp.bfloat16)
    return frozenset(
        path
        for path, leaf in _flat(boxed_params(narrow)).items()
        if nn.meta.unbox(leaf).dtype == jnp.float32 and "norm" not in leaf.names
    )


def boxed_params(model: LanguageModel) -> Params:
    """Returns a model's parameter tree as shapes and dtypes, boxed with logical axis names."""
    tokens_BT = jax.ShapeDtypeStruct((1, 7), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"]


class Slots:
    """A map from every layer's parameters to where the model, which may be scanned, stores them.

    `paths` is {path: (leaf, row)}: "block_5/mixer/q/kernel" may be row 3 of the stacked leaf
    "blocks/block_1/mixer/q/kernel". The row is None for leaves that are not stacked.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        self.leaves = abstract_params(model)  # pyright: ignore[reportArgumentType] (Flax hashes it)
        self._plan = plan = model.plan
        self._first = len(plan.prefix)
        self.paths = dict(self._unrolled())

    def _unrolled(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Yields (path in the unscanned model, (leaf, row)) for every layer's parameters."""
        for leaf in self.leaves:
            match = re.fullmatch(r"blocks/block_(\d+)/(.*)", leaf)
            if not match:
                yield leaf, (leaf, None)
                continue
            for row in range(self._plan.repeats):
                layer = self._first + row * len(self._plan.period) + int(match[1])
                yield f"block_{layer}/{match[2]}", (leaf, row)

    def shape(self, path: str) -> tuple[int, ...]:
        leaf, row = self.paths[path]
        return self.leaves[leaf].shape[0 if row is None else 1 :]

    def dtype(self, path: str) -> np.dtype:
        return self.leaves[self.paths[path][0]].dtype


def check_rules(rules: Iterable[Rule], slots: Slots) -> list[Rule]:
    """Returns `rules`, sorted so that rows of a stacked parameter are adjacent.

    So few parameters are incomplete at a time. Raises ValueError unless each has exactly one rule.
    """
    rules = list(rules)
    named = [path for rule in rules for path in rule.paths]
    if set(named) != set(slots.paths) or len(set(named)) < len(named):
        unnamed = sorted(set(slots.paths) - set(named))
        unknown = sorted(set(named) - set(slots.paths))
        raise ValueError(
            "this architecture's table and the model differ: "
            f"parameters without a tensor: {_listed(unnamed)}; tensors without a parameter: {_listed(unknown)}"
        )
    place = {leaf: i for i, leaf in enumerate(slots.leaves)}
    return sorted(rules, key=lambda rule: min(place[slots.paths[p][0]] for p in rule.paths))


def expected_entries(rules: Sequence[Rule], slots: Slots) -> dict[str, TensorEntry]:
    """Returns {tensor name: shape and dtype} of the tensors that `rules` make of the parameters."""
    entries = {}
    for rule in rules:
        # Arrays of one stored byte each: most rules only change the view.
        stands_for = [np.broadcast_to(np.int8(0), slots.shape(path)) for path in rule.paths]
        for name, array in zip(rule.names, rule.out(*stands_for), strict=True):
            entries[name] = TensorEntry(array.shape, np.dtype(slots.dtype(rule.paths[0])))
    return entries


def check_source(
    source: Source, expected: Mapping[str, TensorEntry], ignored: Sequence[str]
) -> None:
    """Raises ValueError, with a list, if tensors are missing, extra, or of a wrong shape or dtype.

    ignored: regular expressions of names that may be extra, as lm_head.weight always may.
    """
    found = source.entries
    patterns = [re.compile(pattern) for pattern in (*ignored, re.escape(_OUTPUT))]
    missing = [f"missing: {n} {list(e.shape)}" for n, e in expected.items() if n not in found]
    extra = [n for n in found if n not in expected and not any(p.fullmatch(n) for p in patterns)]
    wrong = missing + [f"extra: {name} {list(found[name].shape)}" for name in extra]
    for name, (shape, _) in expected.items():
        has = found.get(name)
        if has and has.shape != shape:
            wrong.append(f"misshapen: {name} should be {list(shape)}, is {list(has.shape)}")
        elif has and has.dtype.name not in _WEIGHT_DTYPES:
            wrong.append(f"of no weights' dtype: {name} is {has.dtype}")
    if wrong:
        raise ValueError(
            f"{source.name} does not fit its config:\n" + _listed([f"  {w}" for w in wrong], "\n")
        )


def is_untied(source: Source, rules: Iterable[Rule], expected: Mapping[str, TensorEntry]) -> bool:
    """Returns whether a tied model's file has an lm_head.weight other than the embedding."""
    found = source.entries
    embedding = next(rule.names[0] for rule in rules if rule.paths == ("embed/embedding",))
    if _OUTPUT in expected or not {_OUTPUT, embedding} <= found.keys():
        return False
    same = found[_OUTPUT] == found[embedding]
    return not (same and np.array_equal(_bits(source, _OUTPUT), _bits(source, embedding)))


def read_params(
    source: Source,
    rules: Sequence[Rule],
    slots: Slots,
    dtype_of: Callable[[str, Sequence[np.dtype]], np.dtype],
    put: Callable[[str, np.ndarray], Any],
) -> Params:
    """Reads a model's parameters from `source`; returns their tree, made of what `put` returns.

    Memory holds what `put` returns and one parameter more.

    dtype_of: (path in the model, dtypes of the tensors it is made of) to the parameter's dtype.
    put: called as put(path, array) for every parameter once it is complete.
    """
    buffers: dict[str, np.ndarray] = {}
    remaining = collections.Counter(leaf for leaf, _ in slots.paths.values())
    # Rows of one stacked parameter may have different dtypes in the file.
    dtypes: dict[str, list[np.dtype]] = {leaf: [] for leaf in slots.leaves}
    for rule in rules:
        for path in rule.paths:
            dtypes[slots.paths[path][0]] += [source.entries[name].dtype for name in rule.names]
    # Fill each leaf row by row, and hand it on when all its rows are there.
    params: dict[str, Any] = {}
    for rule in rules:
        arrays = rule.into(*(source.read(name) for name in rule.names))
        for path, array in zip(rule.paths, arrays, strict=True):
            leaf, row = slots.paths[path]
            if leaf not in buffers:
                buffers[leaf] = np.empty(slots.leaves[leaf].shape, dtype_of(leaf, dtypes[leaf]))
            buffers[leaf][() if row is None else row] = _cast(array, buffers[leaf].dtype, path)
            remaining[leaf] -= 1
            if not remaining[leaf]:
                params[leaf] = put(leaf, buffers.pop(leaf))
    return traverse_util.unflatten_dict(params, sep="/")


def tensor_reader(
    params: Params,
    rules: Sequence[Rule],
    slots: Slots,
    dtype: str | Mapping[str, str] | None = None,
) -> tuple[dict[str, TensorEntry], Callable[[str], np.ndarray]]:
    """Returns the arguments with which `files.write` saves `params`.

    They are all tensors' shapes and dtypes, and a function from a name to that tensor. `dtype` is
    that of `save_pretrained`. Raises ValueError for parameters of another model.
    """
    leaves = _flat(nn.meta.unbox(params))
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    expected = {path: tuple(leaf.shape) for path, leaf in slots.leaves.items()}
    if found != expected:
        wrong = [
            f"  {path}: the model has {expected.get(path, 'none')}, params {found.get(path, 'none')}"
            for path in sorted(found.keys() | expected.keys())
            if found.get(path) != expected.get(path)
        ]
        raise ValueError(
            "the parameters are not those of the model config:\n" + _listed(wrong, "\n")
        )
    rule_of = {name: (rule, i) for rule in rules for i, name in enumerate(rule.names)}

    def ours(path):
        leaf, row = slots.paths[path]
        array = leaves[leaf] if row is None else leaves[leaf][row]
        return np.asarray(jax.device_get(array))

    # A tensor's dtype: its parameter's, or what is asked for, with exceptions in float32.
    entries = {}
    for name, entry in expected_entries(rules, slots).items():
        path = rule_of[name][0].paths[0]
        chosen = np.dtype(leaves[slots.paths[path][0]].dtype)
        if isinstance(dtype, Mapping):
            chosen = dtype.get(path, chosen)
        elif dtype:
            kept = float32_paths(slots.model)  # pyright: ignore[reportArgumentType]
            chosen = np.float32 if slots.paths[path][0] in kept else dtype
        entries[name] = TensorEntry(entry.shape, np.dtype(chosen))

    def read(name):
        rule, i = rule_of[name]
        return _cast(rule.out(*map(ours, rule.paths))[i], entries[name].dtype, name)

    return entries, read


def num_parameters(slots: Slots) -> int:
    return sum(math.prod(leaf.shape) for leaf in slots.leaves.values())


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts `array`; raises ValueError if a finite number becomes infinite, as 1e5 in float16."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast.dtype != array.dtype and np.isinf(cast).sum() > np.isinf(array).sum():
        raise ValueError(f"{name} has numbers that {np.dtype(dtype).name} does not reach")
    return cast


def _bits(source: Source, name: str) -> np.ndarray:
    return source.read(name).reshape(-1).view(np.uint8)


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _listed(lines: Sequence[str], separator: str = ", ") -> str:
    more = [f"... and {len(lines) - _MOST_LISTED} more"] if len(lines) > _MOST_LISTED else []
    return separator.join([*lines[:_MOST_LISTED], *more]) or "none"
