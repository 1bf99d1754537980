"""Measures the cost of decoding by context length: seconds per token and bytes of state."""

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
    """Returns a model config whose full-attention layers have caches of `context` tokens."""
    specs = list(pattern.layers(model_config["pattern"], model_config["num_layers"]))
    for i, spec in enumerate(specs):
        if "max_length" in mixers.options(spec.name):
            options = dict(spec.options) | {"max_length": context}
            specs[i] = pattern.MixerSpec(spec.name, tuple(sorted(options.items())))
    return dict(model_config) | {"pattern": pattern.to_text(specs)}


def state_bytes(model_config: dict[str, Any], context: int) -> int:
    """Returns the bytes of a model's decoding state for one sequence of `context` tokens."""
    model = language_model.from_config(with_context(model_config, context))
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def seconds_per_token(
    model_config: dict[str, Any], params, context: int, tokens: int = 8, rounds: int = 3
) -> float:
    """Returns the median time of a decoding step, over `rounds` rounds of `tokens` steps each.

    Caches have `context` slots and are empty: a step reads all of them, filled or not, so nothing
    has to be prefilled. Compilation is not counted.
    """
    model = language_model.from_config(with_context(model_config, context))

    def step(params, token_BT, state):
        logits_BTW, state = model.apply({"params": params}, token_BT, None, state)
        return jnp.argmax(logits_BTW, axis=-1).astype(jnp.int32), state

    compiled = jax.jit(step, donate_argnums=2)
    token_BT, state = jnp.zeros((1, 1), jnp.int32), jax.jit(lambda: model.init_state(1))()
    times = []
    # The first round compiles and is left out.
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(tokens):
            token_BT, state = compiled(params, token_BT, state)
        np.asarray(token_BT)
        times.append((time.perf_counter() - start) / tokens)
    return statistics.median(times[1:])


def measure(model_config: dict[str, Any], params, contexts: Sequence[int]) -> list[dict]:
    """Returns a dict of context, state_bytes and seconds_per_token for each context length."""
    return [
        {
            "context": context,
            "state_bytes": state_bytes(model_config, context),
            "seconds_per_token": seconds_per_token(model_config, params, context),
        }
        for context in contexts
    ]


def picture(rows: dict[str, list[dict]], path: Path) -> None:
    """Draws milliseconds per token and MB of state over context length, a curve per model."""
    what = {
        "seconds_per_token": ("milliseconds per token", 1e3),
        "state_bytes": ("MB of state", 1e-6),
    }
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
