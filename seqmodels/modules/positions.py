"""Positions of tokens within their documents, and rotary embeddings."""

import math
from typing import Any

import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array

Scaling = tuple[Any, ...]  # a name of SCALINGS and its numbers


def token_positions(
    batch: int, length: int, segment_ids_BT: Array | None, offset_B: Array | None
) -> Array:
    """Returns the index of every token in its document, (B, T) int32, counted from 0.

    segment_ids_BT: document ids; None makes each row one document.
    offset_B: how many tokens of each row's first document came before this call; None is 0.
    """
    if offset_B is None:
        offset_B = jnp.zeros((batch,), jnp.int32)
    index_T = jnp.arange(length, dtype=jnp.int32)
    if segment_ids_BT is None:
        return offset_B[:, None] + index_T[None]
    # Only the first document of a row goes on from an earlier call.
    first_document_BT = operators.run_index(segment_ids_BT) == 0
    return operators.positions(segment_ids_BT) + jnp.where(first_document_BT, offset_B[:, None], 0)


def rope(
    x_BTHK: Array,
    position_BT: Array,
    base: float = 10_000.0,
    fraction: float = 1.0,
    scaling: Scaling | None = None,
) -> Array:
    """Applies rotary embeddings (RoFormer, arXiv 2104.09864, eq. 34) to channel pairs (i, i + K/2).

    Channel pair i is rotated by the angle position * base^(-2i/K), computed in float32.

    Args:
      position_BT: each token's index in its document.
      fraction: the share of channels, from the first on, that is rotated as a head of that size
        would be (GPT-NeoX, arXiv 2204.06745, section 2.1); the other channels stay as they are.
      scaling: how angles are scaled for long contexts, as in `frequencies`.

    Raises:
      ValueError: an odd number of channels to rotate, or an unknown scaling.
    """
    if fraction != 1.0:
        turned = int(x_BTHK.shape[-1] * fraction)
        parts = rope(x_BTHK[..., :turned], position_BT, base, 1.0, scaling), x_BTHK[..., turned:]
        return jnp.concatenate(parts, axis=-1)
    K = x_BTHK.shape[-1]
    if K % 2:
        raise ValueError(f"rope: the head dimension must be even; got {K}")
    frequency_BTK, amplitude = frequencies(K, base, scaling, position_BT)
    angle_BTK = position_BT.astype(jnp.float32)[..., None] * frequency_BTK
    return rotate(x_BTHK, angle_BTK, amplitude)


def rotate(x_BTHK: Array, angle_BTK: Array, amplitude: float = 1.0) -> Array:
    """Rotates channel pairs (i, i + K/2) of all heads by angle_BTK (B, T, K/2), in float32.

    amplitude: a factor of cosines and sines.
    """
    # (first, second) turns to (first cos - second sin, second cos + first sin).
    cos_BT1K, sin_BT1K = (amplitude * f(angle_BTK)[:, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos_BT1K - second * sin_BT1K, second * cos_BT1K + first * sin_BT1K]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


# The forms of `scaling`: for contexts longer than a model was first trained on.
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor", "length"),
    "yarn": ("factor", "length", "amplitude", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low", "high", "length"),
}


def frequencies(
    K: int, base: float, scaling: Scaling | None = None, position_BT: Array | None = None
) -> tuple[Array, float]:
    """Returns the rotary angles per token of K/2 channel pairs, and a factor of cosines and sines.

    The angles are (1, 1, K/2), or (B, T, K/2) where they depend on the position. Without a scaling
    pair i has base^(-2i/K), and the factor is 1. `length` below is the context length that the
    model was first trained on.

    ("linear", factor): all angles are divided by `factor` (position interpolation, arXiv
    2306.15595).

    ("dynamic", factor, length): the base grows with the position ("NTK-aware" scaling). From
    position t = length on it is base * (factor (t + 1) / length - (factor - 1))^(K / (K - 2));
    before that it is `base`. Each token keeps the base of its own position, as in transformers'
    decoding token by token.

    ("yarn", factor, length, amplitude, beta_fast, beta_slow, truncate): angles of pairs that make
    fewer than `beta_slow` full turns in `length` tokens are divided by `factor`; pairs with more
    than `beta_fast` turns keep theirs; pairs i in between blend both linearly in i, between whole
    numbers i where `truncate` (arXiv 2309.00071, section 3.2). `amplitude` is the factor returned.

    ("llama3", factor, low, high, length): as "yarn" with `low` and `high` turns, but the blend is
    linear in the number of turns (Llama 3.1, arXiv 2407.21783, and its released config).

    Raises ValueError for a scaling of another form.
    """
    index_11K = jnp.arange(K // 2, dtype=jnp.float32)[None, None]
    frequency_11K = base ** (-2.0 * index_11K / K)
    if scaling is None:
        return frequency_11K, 1.0
    kind, *values = scaling
    if len(values) != len(SCALINGS.get(kind, ())) or not values:
        forms = (f"({', '.join([repr(name), *fields])})" for name, fields in SCALINGS.items())
        raise ValueError(f"rope_scaling is {scaling!r}; it must be {' or '.join(forms)}")
    factor = values[0]
    if kind == "linear":
        return frequency_11K / factor, 1.0
    if kind == "dynamic":
        if position_BT is None:
            return frequency_11K, 1.0
        share_BT = jnp.maximum(position_BT.astype(jnp.float32) + 1.0, values[1]) / values[1]
        growth_BT1 = (1.0 + factor * (share_BT - 1.0))[..., None]
        return frequency_11K * growth_BT1 ** (-2.0 * index_11K / max(K - 2, 1)), 1.0
    if kind == "yarn":
        # The pairs that turn beta_fast and beta_slow times, between which the blend lies.
        _, length, amplitude, beta_fast, beta_slow, truncate = values
        first, last = (
            K * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (beta_fast, beta_slow)
        )
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, K - 1)
        last += 0.001 * (first == last)
        kept_11K = 1.0 - jnp.clip((index_11K - first) / (last - first), 0.0, 1.0)
    else:
        _, low, high, length = values
        amplitude, turns_11K = 1.0, length * frequency_11K / (2 * math.pi)
        kept_11K = jnp.clip((turns_11K - low) / (high - low), 0.0, 1.0)
    return frequency_11K * (kept_11K + (1.0 - kept_11K) / factor), amplitude
