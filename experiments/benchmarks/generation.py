"""Measures time per generated token over context length: constant for a recurrent stack, not for
full attention."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import pictures, timing
from experiments.benchmarks.report import Row, Section, Target
from seqmodels import language_model

# What is timed: a stack of one mixer each. The cache of full attention holds what was read and what
# is generated.
PATTERNS = {
    "gated_delta_net": "gated_delta_net(num_heads={heads}, head_dim={head_dim}, expand_v=1.0)",
    "attention": "attention(num_heads={heads}, head_dim={head_dim}, max_length={length})",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the generation benchmark.

    contexts: numbers of tokens that a model reads before the clock starts. piece: tokens read in
      one call. tokens: tokens generated in one measurement.
    """

    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch: int = 1
    d_model: int = 128
    num_layers: int = 4
    heads: int = 4
    head_dim: int = 32
    piece: int = 256
    tokens: int = 32
    rounds: int = 15


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, state, tokens_BT):
    """Feeds tokens to the model; returns the likeliest next token (B, 1) and the decoding state."""
    logits_BTW, state = model.apply({"params": params}, tokens_BT, state=state)
    return jnp.argmax(logits_BTW[:, -1:], axis=-1).astype(jnp.int32), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model, batch):
    params = model.init(jax.random.key(0), jnp.zeros((batch, 1), jnp.int32))["params"]
    return nn.meta.unbox(params), model.init_state(batch)


class Generation:
    """A model that has read `context` random tokens; each call generates `settings.tokens` more."""

    def __init__(self, pattern: str, context: int, settings: Settings):
        self._tokens = settings.tokens
        # As many calls as timing.interleaved makes: three to warm up, then the rounds.
        length = context + settings.tokens * (3 + max(settings.rounds, timing.MIN_ROUNDS))
        pattern = pattern.format(heads=settings.heads, head_dim=settings.head_dim, length=length)
        self._model = language_model.from_config(
            {
                "pattern": pattern,
                "num_layers": settings.num_layers,
                "d_model": settings.d_model,
                "vocab_size": 256,
            }
        )
        tokens_BT = np.random.default_rng(0).integers(0, 256, (settings.batch, context), np.int32)
        self._params, self._state = _start(self._model, settings.batch)
        for start in range(0, context, settings.piece):
            self._next(tokens_BT[:, start : start + settings.piece])

    @property
    def state_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def __call__(self):
        for _ in range(self._tokens):
            self._next(self._token_B1)
        jax.block_until_ready(self._token_B1)

    def _next(self, tokens_BT):
        self._token_B1, self._state = _read(self._model, self._params, self._state, tokens_BT)


def section(settings: Settings, folder: Path, title: str) -> Section:
    """Measures time per generated token by model and context; draws generation.png in `folder`."""
    rows = run(settings)
    pictures.generation(rows, folder / "generation.png", title)
    given = dataclasses.asdict(settings)
    return Section("generation", given, rows, [display(row) for row in rows], targets(rows))


def run(settings: Settings, log: Callable[[str], None] = print) -> list[Row]:
    """Returns a row per model and context length: time per generated token, and size of the state.

    A model's contexts are timed in turn. The models run one after the other, so that the large
    cache of one does not slow down another.
    """
    rows = []
    for name, pattern in PATTERNS.items():
        log(f"generation: {name} reads {', '.join(map(str, settings.contexts))} tokens")
        calls = {context: Generation(pattern, context, settings) for context in settings.contexts}
        sizes = {context: call.state_bytes for context, call in calls.items()}
        timings = timing.interleaved(calls, settings.rounds, float("inf"), block_seconds=0.0)
        first = timings[settings.contexts[0]].median
        rows += [
            {
                "model": name,
                "context": context,
                **took.row(settings.tokens),
                "ratio": took.median / first,
                "state_bytes": sizes[context],
            }
            for context, took in timings.items()
        ]
    return rows


def display(row: Row) -> Row:
    """Returns one measurement as a row of the printed table."""
    return {
        "model": row["model"],
        "tokens read": row["context"],
        "ms per token": 1e3 * row["seconds"],
        "q1": 1e3 * row["seconds_lower"],
        "q3": 1e3 * row["seconds_upper"],
        "x first": row["ratio"],
        "state MiB": row["state_bytes"] / 2**20,
    }


def targets(rows: list[Row]) -> list[Target]:
    claim = (
        "gated_delta_net: time per generated token does not depend on how much was read (within "
        "15%)"
    )
    here = {row["context"]: row["seconds"] for row in rows if row["model"] == "gated_delta_net"}
    if len(here) < 2:
        return [Target(claim, "-", None)]
    spread = max(here.values()) / min(here.values())
    listed = ", ".join(f"{1e3 * x:.3f} ms after {context}" for context, x in here.items())
    return [Target(claim, f"{listed}; slowest over fastest {spread:.2f}", spread <= 1.15)]
