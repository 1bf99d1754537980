"""Routing of a document's channels to experts, and the losses that balance it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.array_typing import Array


class Choice(NamedTuple):
    """Fields of a top-1 choice of an expert for each row of channels.

    Attributes:
      expert: the chosen expert, (...) int32.
      weight: its probability, (...) float32; 0 where the expert was full.
      sums: "importance" and "load" of each expert, (X,), summed over the counted rows.
    """

    expert: Array
    weight: Array
    sums: dict[str, Array]


def choose(logits: Array, counted: Array, noise_key: Array | None) -> Choice:
    """Chooses the most likely expert of each row (Shazeer et al., arXiv 1701.06538, section 4).

        p = softmax(logits + eps),  eps ~ N(0, 1/X^2) in training
        importance_i = sum over rows of p_i
        load_i = sum over rows of P(logit_i + eps' >= the largest noisy logit), eps' fresh noise

    Args:
      logits: (..., X) float32.
      counted: (...) booleans, the rows that the sums are over.
      noise_key: a key for eps; None leaves eps out.
    """
    X = logits.shape[-1]
    noisy = logits
    if noise_key is not None:
        noisy = logits + jax.random.normal(noise_key, logits.shape) / X
    p = jax.nn.softmax(noisy)
    threshold = jnp.max(noisy, axis=-1, keepdims=True)
    exceeds = jax.scipy.stats.norm.cdf((logits - threshold) * X)
    axes = tuple(range(logits.ndim - 1))

    def total(values):
        return jnp.sum(jnp.where(counted[..., None], values, 0.0), axis=axes)

    sums = {"importance": total(p), "load": total(exceeds)}
    return Choice(jnp.argmax(p, axis=-1), jnp.max(p, axis=-1), sums)


def within_capacity(choice: Choice, experts: int, factor: float | None) -> Choice:
    """Returns the choice with weight 0 where an expert has more than factor R / X of the R rows.

    The last axis are the rows that share the experts. Rows with the largest weights are served
    first (batch prioritised routing, Riquelme et al., arXiv 2106.05974, section 4.1).
    """
    if factor is None:
        return choice
    R = choice.expert.shape[-1]
    capacity = max(math.ceil(factor * R / experts), 1)
    # A row's rank is the number of rows with the same expert that have a larger weight.
    order = jnp.argsort(-choice.weight, axis=-1)
    expert_sorted = jnp.take_along_axis(choice.expert, order, axis=-1)
    chosen = jax.nn.one_hot(expert_sorted, experts, dtype=jnp.int32)
    rank_sorted = jnp.sum((jnp.cumsum(chosen, axis=-2) - 1) * chosen, axis=-1)
    rank = jnp.take_along_axis(rank_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return choice._replace(weight=jnp.where(rank < capacity, choice.weight, 0.0))


def balance_loss(sums: dict[str, Array]) -> Array:
    """Returns 1/2 CV^2(importance) + 1/2 CV^2(load), CV^2 = variance / mean^2 over the experts."""

    def squared_variation(x_X):
        return jnp.var(x_X) / (jnp.square(jnp.mean(x_X)) + 1e-10)

    return 0.5 * (squared_variation(sums["importance"]) + squared_variation(sums["load"]))
