"""delta_rule and diagonal_plus_low_rank: the conformance suite, and what only these operators promise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta_rule, diagonal_plus_low_rank
from kernels_pallas.delta_rule import step, step_diagonal_plus_low_rank
from kernels_pallas.delta_rule.shapes import DIAGONAL_PLUS_LOW_RANK_SHAPES, SHAPES
from tests.kernels_pallas.conformance import (
    OperatorCase,
    Shape,
    Suite,
    assert_close,
    everything,
    inputs_of,
    truth,
)


def _normal(rng, *size):
    return rng.standard_normal(size).astype(np.float32)


def _unit(rng, *size):
    x = rng.standard_normal(size)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _gate(rng, size, kind):
    uniform = rng.random(size)
    match kind:
        case "weak":
            gate = -0.02 * uniform
        case "strong":
            gate = np.full(size, -50.0)
        case "mixed":
            gate = -np.choose(rng.integers(0, 4, size), [1e-3, 0.3, 4.0, 50.0]) * uniform
        case "resets":
            gate = np.where(uniform < 0.05, -np.inf, -0.1 * uniform)
    return gate.astype(np.float32)


def _log_decay(rng, shape, words):
    """{} or the log_decay named by the last two of a regime's words, such as "head weak"."""
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    match words:
        case [*_, "fixed"]:
            return {"log_decay": np.log1p(-(2.0 ** -np.linspace(5, 8, H))).astype(np.float32)}
        case [*_, "head", kind]:
            return {"log_decay": _gate(rng, (B, T, H), kind)}
        case [*_, "channel", kind]:
            return {"log_decay": _gate(rng, (B, T, H, K), kind)}
    return {}


def _delta_rule_inputs(rng, shape: Shape, regime: str):
    B, T, H, G, K, V = (getattr(shape, name) for name in "BTHGKV")
    k, beta = _unit(rng, B, T, G, K), 2 * rng.random((B, T, H)).astype(np.float32)
    match regime:
        case "beta 0":
            beta = np.zeros_like(beta)
        case "beta 1":
            beta = np.ones_like(beta)
        case "beta 2":
            beta = np.full_like(beta, 2.0)
        case "repeated keys, any beta":
            k = k[:, np.arange(T) % 3]
        case "one key, beta 2":
            k, beta = k[:, np.zeros(T, int)], np.full_like(beta, 2.0)
        case "long keys":  # beta |k|^2 up to 2, with |k| up to 3
            length = 1 + 2 * rng.random((B, T, G, 1)).astype(np.float32)
            k, beta = k * length, beta / np.repeat(length[..., 0] ** 2, H // G, axis=2)
    return {
        "q": _unit(rng, B, T, G, K),
        "k": k,
        "v": _normal(rng, B, T, H, V),
        "beta": beta,
        "initial_state": _normal(rng, B, H, K, V),
        **_log_decay(rng, shape, regime.split()),
    }


def _diagonal_plus_low_rank_inputs(rng, shape: Shape, regime: str):
    """As in RWKV-7: a = -(rate * b), b of norm 1. In "twice" the rate is 2, a reflection."""
    B, T, H, G, K, V = (getattr(shape, name) for name in "BTHGKV")
    b = _unit(rng, B, T, H, K)
    rate = rng.random((B, T, H, K)).astype(np.float32)
    return {
        "q": _unit(rng, B, T, G, K),
        "k": _unit(rng, B, T, G, K),
        "v": _normal(rng, B, T, H, V),
        "a": -(np.float32(2.0) if regime == "twice" else rate) * b,
        "b": b,
        "initial_state": _normal(rng, B, H, K, V),
        **_log_decay(rng, shape, regime.split()),
    }


def _caller(operator, names):
    def call(inputs, **keywords):
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in names]
        return operator(*first, **inputs, **keywords)

    return call


def _stepper(one_token, names):
    def call(token, state):
        token = dict(token)
        first = [token.pop(name) for name in names]
        return one_token(*first, **token, state=state)

    return call


DECAYS = tuple(
    f"{axis} {kind}"
    for axis in ("head", "channel")
    for kind in ("weak", "strong", "mixed", "resets")
)
DELTA_RULE = OperatorCase(
    name="delta_rule",
    implementations=("chunked",),
    make_inputs=_delta_rule_inputs,
    call=_caller(delta_rule, ("q", "k", "v", "beta")),
    step=_stepper(step, ("q", "k", "v", "beta")),
    regimes=(
        *("none", "beta 0", "beta 1", "beta 2", "repeated keys, any beta", "one key, beta 2"),
        *("long keys", "fixed", *DECAYS),
    ),
    typical=("head weak",),
    fast=((1, "head weak"), (100, "one key, beta 2"), (100, "channel mixed"), (100, "head strong")),
    rounded=("q", "k", "v"),
)
DIAGONAL_PLUS_LOW_RANK = OperatorCase(
    name="diagonal_plus_low_rank",
    implementations=("chunked",),
    make_inputs=_diagonal_plus_low_rank_inputs,
    call=_caller(diagonal_plus_low_rank, ("q", "k", "v", "a", "b")),
    step=_stepper(step_diagonal_plus_low_rank, ("q", "k", "v", "a", "b")),
    regimes=("none", "twice", "fixed", *DECAYS),
    typical=("channel weak",),
    fast=((100, "channel resets"),),
    rounded=("q", "k", "v", "a", "b"),
)


class TestDeltaRule(Suite):
    case = DELTA_RULE


class TestDiagonalPlusLowRank(Suite):
    case = DIAGONAL_PLUS_LOW_RANK
