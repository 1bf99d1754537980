"""What a token costs when much has been read: time and bytes of state against the length of the
context."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import plots
from seqmodels import language_model, mixers
from seqmodels.modules import pattern


def with_context(model_config: dict[str, Any], context: int) -> dict[str, Any]:
    """The config of the same model whose full-attention layers keep so many tokens."""
    specs = pattern.layers(model_config["pattern"], model_config["num_layers"])
    specs = tuple(
        pattern.MixerSpec(
            s.name, tuple(sorted((dict(s.options) | {"max_length": context}).items()))
        )
        if "max_length" in mixers.options(s.name)
        else s
        for s in specs
    )
    return dict(model_config) | {"pattern": pattern.to_text(specs)}


def state_bytes(model_config: dict[str, Any], context: int) -> int:
    """Of one sequence's state after `context` tokens."""
    model = language_model.from_config(with_context(model_config, context))
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def seconds_per_token(
    model_config: dict[str, Any], params, context: int, tokens: int = 8, rounds: int = 3
) -> float:
    """Of one sequence's decoding, the median of `rounds` runs of `tokens` steps, compilation left
    out.

    The cache is `context` tokens long and empty: a step reads all its slots, filled or not, so that
    nothing needs to be prefilled.
    """
    model = language_model.from_config(with_context(model_config, context))

    def step(params, token_BT, state):
        logits_BTW, state = model.apply({"params": params}, token_BT, None, state)
        return jnp.argmax(logits_BTW, axis=-1).astype(jnp.int32), state

    compiled = jax.jit(step, donate_argnums=2)
    token_BT, state = jnp.zeros((1, 1), jnp.int32), jax.jit(lambda: model.init_state(1))()
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(tokens):
            token_BT, state = compiled(params, token_BT, state)
        np.asarray(token_BT)
        times.append((time.perf_counter() - start) / tokens)
    return statistics.median(times[1:])


def measure(model_config: dict[str, Any], params, contexts: Sequence[int]) -> list[dict]:
    """Rows context, state_bytes, seconds_per_token."""
    return [
        {
            "context": context,
            "state_bytes": state_bytes(model_config, context),
            "seconds_per_token": seconds_per_token(model_config, params, context),
        }
        for context in contexts
    ]


def picture(rows: dict[str, list[dict]], path: Path) -> None:
    """Milliseconds a token and megabytes of state against the context, a line a model."""
    what = {"seconds_per_token": ("milliseconds per token", 1e3), "state_bytes": ("MB of state", 1e-6)}
    plots.lines(
        {
            label: {
                name: [(row["context"], scale * row[field]) for row in table]
                for name, table in rows.items()
            }
            for field, (label, scale) in what.items()
        },
        "tokens of context",
        path,
    )
