"""Positions of tokens within their documents, and the rotations that carry them."""

import math

import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array

Scaling = tuple[str | float, ...]


def token_positions(
    batch: int, length: int, segment_ids_BT: Array | None, offset_B: Array | None
) -> Array:
    """Index of every token in its document, (B, T) int32.

    offset_B: how many tokens of the first token's document came before this call.
    """
    if offset_B is None:
        offset_B = jnp.zeros((batch,), jnp.int32)
    index_T = jnp.arange(length, dtype=jnp.int32)
    if segment_ids_BT is None:
        return offset_B[:, None] + index_T[None]
    first_document_BT = operators.run_index(segment_ids_BT) == 0
    return operators.positions(segment_ids_BT) + jnp.where(first_document_BT, offset_B[:, None], 0)


def rope(
    x_BTHK: Array,
    position_BT: Array,
    base: float = 10_000.0,
    fraction: float = 1.0,
    scaling: Scaling | None = None,
) -> Array:
    """Rotary embedding (RoFormer, arXiv 2104.09864, eq. 34), pairing channel i with i + K/2.

    Channel pair i turns by position * base^(-2i/K). K must be even. Angles are float32.
    fraction: the first so large part of the channels is rotated as if it were all (GPT-NeoX, arXiv 2204.06745); the rest stays.
    scaling: see `scale_frequencies`.
    """
    if fraction != 1.0:
        turned = int(x_BTHK.shape[-1] * fraction)
        parts = rope(x_BTHK[..., :turned], position_BT, base, 1.0, scaling), x_BTHK[..., turned:]
        return jnp.concatenate(parts, axis=-1)
    K = x_BTHK.shape[-1]
    if K % 2:
        raise ValueError(f"rope: the head dimension must be even; got {K}")
    frequency_K = base ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    if scaling is not None:
        frequency_K = scale_frequencies(frequency_K, scaling)
    angle_BTK = position_BT.astype(jnp.float32)[..., None] * frequency_K[None, None]
    cos_BT1K, sin_BT1K = jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos_BT1K - second * sin_BT1K, second * cos_BT1K + first * sin_BT1K]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


def scale_frequencies(frequency_K: Array, scaling: Scaling) -> Array:
    """The frequencies of `rope` for contexts longer than a model was first trained on.

    ("linear", c): all divided by c (position interpolation, arXiv 2306.15595).
    ("llama3", c, low, high, T): wavelengths longer than T / low are divided by c, those shorter than T / high stay, and
      between them is a blend, linear in T / wavelength (Llama 3.1, arXiv 2407.21783, and its released config).
    """
    kind, factor, *rest = scaling
    if kind == "linear" and not rest:
        return frequency_K / factor
    if kind != "llama3" or len(rest) != 3:
        raise ValueError(
            f"rope_scaling is {scaling!r}; it must be ('linear', factor) or ('llama3', factor, low, high, length)"
        )
    low, high, length = rest
    turns_K = length * frequency_K / (2 * math.pi)
    share_K = jnp.minimum(jnp.maximum((turns_K - low) / (high - low), 0.0), 1.0)
    return frequency_K * (share_K + (1.0 - share_K) / factor)
