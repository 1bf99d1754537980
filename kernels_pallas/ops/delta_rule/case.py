"""The test inputs of `delta_rule` and `diagonal_plus_low_rank`, and the kinds of call to check."""

import dataclasses

import numpy as np

from kernels_pallas.common import regimes
from kernels_pallas.ops.linear_attention import case as linear_attention


def _delta_rule_inputs(rng, shape, regime):
    B, T, H, G, K, V = shape.B, shape.T, shape.H, shape.key_heads, shape.K, shape.V
    if regime.endswith((" check", " trained")):
        most = 1 if regime.endswith("trained") else 2
        beta = most * rng.random((B, T, H)).astype(np.float32)
        return regimes.recurrence(rng, shape, regime) | {"beta": beta}
    k, beta = regimes.unit(rng, B, T, G, K), 2 * rng.random((B, T, H)).astype(np.float32)
    match regime:
        case "beta 0":
            beta = np.zeros_like(beta)
        case "beta 1":
            beta = np.ones_like(beta)
        case "beta 2":
            beta = np.full_like(beta, 2.0)
        case "repeated keys, any beta":
            k = k[:, np.arange(T) % 3]
        case "one key, beta 2" | "one key, beta 2 per_channel zero":
            k, beta = k[:, np.zeros(T, int)], np.full_like(beta, 2.0)
        case "long keys":  # beta |k|^2 up to 2, with |k| up to 3
            length = 1 + 2 * rng.random((B, T, G, 1)).astype(np.float32)
            k, beta = k * length, beta / np.repeat(length[..., 0] ** 2, H // G, axis=2)
    return {
        "q": regimes.unit(rng, B, T, G, K),
        "k": k,
        "v": regimes.normal(rng, B, T, H, V),
        "beta": beta,
        "initial_state": regimes.normal(rng, B, H, K, V),
        **regimes.log_decay(rng, shape, regime),
    }


def _diagonal_plus_low_rank_inputs(rng, shape, regime):
    """Draws inputs by name as in RWKV-7: a = -(rate * b), |b| = 1.

    In the regime "twice" the rate is 2, which makes each token's transition a reflection.
    """
    B, T, H, G, K, V = shape.B, shape.T, shape.H, shape.key_heads, shape.K, shape.V
    b = regimes.unit(rng, B, T, H, K)
    rate = rng.random((B, T, H, K)).astype(np.float32)
    return {
        "q": regimes.unit(rng, B, T, G, K),
        "k": regimes.unit(rng, B, T, G, K),
        "v": regimes.normal(rng, B, T, H, V),
        "a": -(np.float32(2.0) if regime == "twice" else rate) * b,
        "b": b,
        "initial_state": regimes.normal(rng, B, H, K, V),
        **regimes.log_decay(rng, shape, regime),
    }


def _diagonal_plus_low_rank_kind(*, q_BTHK, k_BTHK, **others):
    del q_BTHK  # scaled already, in float32
    return linear_attention.recurrence_kind(q_BTGK=k_BTHK, k_BTGK=k_BTHK, **others)


CASE = dataclasses.replace(
    linear_attention.CASE,
    positional=("q", "k", "v", "beta"),
    inputs=_delta_rule_inputs,
    regimes=(
        *("none", "beta 0", "beta 1", "beta 2", "repeated keys, any beta", "one key, beta 2"),
        "one key, beta 2 per_channel zero",
        *("long keys", "per_head", *regimes.DECAYS),
    ),
)
DIAGONAL_PLUS_LOW_RANK_CASE = dataclasses.replace(
    linear_attention.CASE,
    positional=("q", "k", "v", "a", "b"),
    inputs=_diagonal_plus_low_rank_inputs,
    kind_of=_diagonal_plus_low_rank_kind,
    regimes=("none", "twice", "per_head", *regimes.DECAYS),
    rounded=("q", "k", "v", "a", "b"),
)
