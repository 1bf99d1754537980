"""Random inputs for checks and benchmarks of the operators (`ops/<operator>/case.py`)."""

import numpy as np

# Distributions of log decays, beside "check" and "trained"; all are legal arguments.
LAWS = ("weak", "strong", "mixed", "resets", "extreme")
DECAYS = tuple(f"{kind} {law}" for kind in ("per_token", "per_channel") for law in LAWS)


def normal(rng, *size, dtype: type[np.generic] = np.float32):
    """Draws standard normal numbers of shape `size`; of complex ones both parts are normal."""
    x = rng.standard_normal(size)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(size)
    return x.astype(dtype)


def unit(rng, *size):
    """Draws random vectors (the last axis of shape `size`) of length 1."""
    x = rng.standard_normal(size)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def gate(rng, size, law: str):
    """Draws log decays of shape `size` from the distribution named `law`, such as "weak"."""
    if law == "trained":  # half-lives from a few tokens to a few thousand
        return -np.exp(rng.uniform(np.log(3e-4), np.log(0.3), size)).astype(np.float32)
    if law == "check":  # from hardly any to nothing left, and now and then exactly nothing
        log_decay = -np.exp(rng.uniform(np.log(1e-3), np.log(3), size))
        return np.where(rng.uniform(size=size) < 0.01, -np.inf, log_decay).astype(np.float32)
    uniform = rng.random(size)
    match law:
        case "zero":
            log_decay = np.zeros(size)
        case "weak":
            log_decay = -0.02 * uniform
        case "strong":
            log_decay = np.full(size, -50.0)
        case "mixed":
            log_decay = -np.choose(rng.integers(0, 4, size), [1e-3, 0.3, 4.0, 50.0]) * uniform
        case "resets":
            log_decay = np.where(uniform < 0.05, -np.inf, -0.1 * uniform)
        case "extreme":  # down to the least of float32: sums of two are -inf
            choices = [0, 0, -1e-30, -0.1, -800.0, -1e30, np.finfo(np.float32).min]
            log_decay = np.choose(rng.integers(0, 7, size), choices)
        case _:
            raise ValueError(f"unknown law of decays {law!r}")
    return log_decay.astype(np.float32)


def log_decay(rng, shape, regime: str) -> dict:
    """Returns {"log_decay": array} for a regime that ends in kind and law, as "per_token weak".

    "per_head" alone is RetNet's decay. Other regimes give {}. shape: a `dispatch.case.Shape`.
    """
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    sizes = {"per_head": (H,), "per_token": (B, T, H), "per_channel": (B, T, H, K)}
    match regime.split():
        case [*_, "per_head"]:
            return {"log_decay": np.log1p(-(2.0 ** -np.linspace(5, 8, H))).astype(np.float32)}
        case [*_, kind, law] if kind in sizes:
            return {"log_decay": gate(rng, sizes[kind], law)}
    return {}


def recurrence(rng, shape, regime: str) -> dict:
    """Draws a matrix recurrence's inputs by name: q, k, v, initial_state and a log_decay."""
    B, T, H, G, K, V = shape.B, shape.T, shape.H, shape.key_heads, shape.K, shape.V
    q_BTGK, k_BTGK = normal(rng, B, T, G, K), normal(rng, B, T, G, K)
    v_BTHV, state_BHKV = normal(rng, B, T, H, V), normal(rng, B, H, K, V)
    if regime.endswith((" check", " trained")):
        k_BTGK /= np.linalg.norm(k_BTGK, axis=-1, keepdims=True)
        state_BHKV /= np.float32(K**0.5)
    arrays = {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV, "initial_state": state_BHKV}
    return arrays | log_decay(rng, shape, regime)
