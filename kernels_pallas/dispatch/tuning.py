"""Chunk and block sizes of kernels: from a table of tuned sizes, else from the kernel's own rule.

`tuned.json` beside this file maps keys to sizes. A key is written
operator/implementation/.../device kind; an implementation says what stands between, for instance

    delta_rule/pallas_tpu/bfloat16/128x128 per_token/TPU v6 lite  {"chunk_size": 128, "heads": 8}
    delta_rule/triton/writes/bfloat16                             {"BV": 32, "num_warps": 8}

An entry holds for its key and for all longer keys that begin with it (the second: for every shape
and GPU), and the longer key wins. K x V, the kind of decay and the device must match exactly: sizes
for a neighbouring shape are no better than the rule, and may not fit. Nothing is ever tuned while a
model runs; `python -m experiments.bench tune` writes the table.
"""

import contextlib
import contextvars
import functools
import json
import pathlib

from kernels_pallas.dispatch import devices

TABLE = pathlib.Path(__file__).with_name("tuned.json")
_TRIED: contextvars.ContextVar[dict | None] = contextvars.ContextVar("tried", default=None)
_ASKED: contextvars.ContextVar[dict | None] = contextvars.ContextVar("asked", default=None)


def lookup(heuristic: dict[str, int], operator: str, implementation: str, *rest: str) -> dict:
    """Returns the chunk and block sizes of a call being traced, such as {"chunk_size": 64}.

    heuristic: the implementation's own sizes; the table may replace any of them, and adds none.
    rest: the key's middle parts, which the sizes depend on, from the general to the special. The
      device's kind is added here.
    """
    key = (operator, implementation, *rest, devices.current().kind)
    found, tried = dict(heuristic), _TRIED.get() or {}
    for n in range(2, len(key) + 1):
        prefix = "/".join(key[:n])
        found |= _table().get(prefix, {}) | tried.get(prefix, {})
    sizes = {name: found[name] for name in heuristic}
    if (asked_for := _ASKED.get()) is not None:
        asked_for["/".join(key)] = sizes
    return dict(sizes)


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())


@contextlib.contextmanager
def trying(sizes: dict[str, dict[str, int]]):
    """Context manager: makes `sizes`, entries by key, override the tuned table in its block.

    They are read at tracing: trace a function that no cache has.
    """
    token = _TRIED.set(sizes)
    try:
        yield
    finally:
        _TRIED.reset(token)


@contextlib.contextmanager
def asked():
    """Context manager: yields a dict of the keys looked up in its block, with their sizes."""
    found = {}
    token = _ASKED.set(found)
    try:
        yield found
    finally:
        _ASKED.reset(token)


def save(entries: dict[str, dict[str, int]], path: pathlib.Path = TABLE) -> None:
    """Writes entries to the table of tuned sizes, replacing those of the same keys.

    An empty entry removes its key.
    """
    merged = json.loads(path.read_text()) | entries
    lines = [
        f" {json.dumps(key)}: {json.dumps(merged[key])}" for key in sorted(merged) if merged[key]
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    _table.cache_clear()
