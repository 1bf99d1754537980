"""linear_attention: the conformance suite, and what only this operator promises."""

import numpy as np

from kernels_pallas import linear_attention
from kernels_pallas.linear_attention import step
from tests.kernels_pallas.conformance import OperatorCase, Shape, Suite


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


def _inputs(rng, shape: Shape, regime: str):
    B, T, H, G, K, V = (getattr(shape, name) for name in "BTHGKV")
    inputs = {
        "q": rng.standard_normal((B, T, G, K)).astype(np.float32),
        "k": rng.standard_normal((B, T, G, K)).astype(np.float32),
        "v": rng.standard_normal((B, T, H, V)).astype(np.float32),
        "initial_state": rng.standard_normal((B, H, K, V)).astype(np.float32),
    }
    if regime == "fixed":
        inputs["log_decay"] = np.log1p(-(2.0 ** -np.linspace(5, 8, H))).astype(np.float32)
    elif regime != "none":
        axis, kind = regime.split()
        size = {"head": (B, T, H), "channel": (B, T, H, K)}[axis]
        inputs["log_decay"] = _gate(rng, size, kind)
    return inputs


def _call(inputs, **keywords):
    inputs = dict(inputs)
    qkv = [inputs.pop(name) for name in "qkv"]
    return linear_attention(*qkv, **inputs, **keywords)


def _step(token, state):
    token = dict(token)
    qkv = [token.pop(name) for name in "qkv"]
    return step(*qkv, **token, state=state)


CASE = OperatorCase(
    name="linear_attention",
    implementations=("chunked",),
    make_inputs=_inputs,
    call=_call,
    step=_step,
    regimes=(
        "none",
        "fixed",
        *(f"{axis} {kind}" for axis in ("head", "channel") for kind in ("weak", "strong", "mixed", "resets")),
    ),
    typical=("none", "head weak", "channel weak"),
    fast=((1, "head weak"), (100, "none")),
    rounded=("q", "k", "v"),
)


class TestLinearAttention(Suite):
    case = CASE
