"""delta_rule and diagonal_plus_low_rank: the conformance suite, and what only these operators
promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta_rule, diagonal_plus_low_rank
from kernels_pallas.ops.delta_rule import compensated, step, step_diagonal_plus_low_rank
from kernels_pallas.ops.delta_rule.shapes import DIAGONAL_PLUS_LOW_RANK_SHAPES, SHAPES
from tests.kernels_pallas.ops.conformance import (
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
        case "zero":
            gate = np.zeros(size)
        case "weak":
            gate = -0.02 * uniform
        case "strong":
            gate = np.full(size, -50.0)
        case "mixed":
            gate = -np.choose(rng.integers(0, 4, size), [1e-3, 0.3, 4.0, 50.0]) * uniform
        case "resets":
            gate = np.where(uniform < 0.05, -np.inf, -0.1 * uniform)
        case "extreme":  # legal down to the least of float32: sums of two are -inf
            least = np.finfo(np.float32).min
            gate = np.choose(rng.integers(0, 7, size), [0, 0, -1e-30, -0.1, -800.0, -1e30, least])
    return gate.astype(np.float32)


def _log_decay(rng, shape, words):
    """{} or the log_decay named by the last two of a regime's words, such as "per_token weak"."""
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    match words:
        case [*_, "per_head"]:
            return {"log_decay": np.log1p(-(2.0 ** -np.linspace(5, 8, H))).astype(np.float32)}
        case [*_, "per_token", kind]:
            return {"log_decay": _gate(rng, (B, T, H), kind)}
        case [*_, "per_channel", kind]:
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
        case "one key, beta 2" | "one key, beta 2 per_channel zero":
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
    for axis in ("per_token", "per_channel")
    for kind in ("weak", "strong", "mixed", "resets", "extreme")
)
DELTA_RULE = OperatorCase(
    name="delta_rule",
    implementations=("chunked", "naive_chunk"),
    make_inputs=_delta_rule_inputs,
    call=_caller(delta_rule, ("q", "k", "v", "beta")),
    step=_stepper(step, ("q", "k", "v", "beta")),
    regimes=(
        *("none", "beta 0", "beta 1", "beta 2", "repeated keys, any beta", "one key, beta 2"),
        "one key, beta 2 per_channel zero",
        *("long keys", "per_head", *DECAYS),
    ),
    typical=("per_token weak",),
    fast=(
        *((100, "one key, beta 2"), (100, "per_channel mixed"), (100, "per_channel extreme")),
        (100, "one key, beta 2 per_channel zero"),
        *((100, "per_token extreme"), (100, "per_token resets")),
    ),
    rounded=("q", "k", "v"),
)
DIAGONAL_PLUS_LOW_RANK = OperatorCase(
    name="diagonal_plus_low_rank",
    implementations=("chunked", "naive_chunk"),
    make_inputs=_diagonal_plus_low_rank_inputs,
    call=_caller(diagonal_plus_low_rank, ("q", "k", "v", "a", "b")),
    step=_stepper(step_diagonal_plus_low_rank, ("q", "k", "v", "a", "b")),
    regimes=("none", "twice", "per_head", *DECAYS),
    typical=("per_channel weak",),
    fast=(),
    rounded=("q", "k", "v", "a", "b"),
)


class TestDeltaRule(Suite):
    case = DELTA_RULE


class TestDiagonalPlusLowRank(Suite):
    case = DIAGONAL_PLUS_LOW_RANK

    def pytest_generate_tests(self, metafunc):
        if "typical" not in metafunc.fixturenames:
            super().pytest_generate_tests(metafunc)
            return
        # What these tests look at is the pass over chunks, which the fast cut has with delta_rule.
        metafunc.parametrize("implementation", self.case.implementations)
        typical = [pytest.param(regime, marks=pytest.mark.slow) for regime in self.case.typical]
        metafunc.parametrize("typical", typical)


def test_general_form_holds_the_delta_rule():
    """a = -beta k, b = exp(g) k, k = beta k; and RWKV-7 is another of its cases, written here with
    its own (V, K) state."""
    x = inputs_of(DELTA_RULE, Shape(), "per_channel weak")
    q, k, v, beta, g, S = (x[n] for n in ("q", "k", "v", "beta", "log_decay", "initial_state"))
    scaled = beta[..., None] * k
    general = diagonal_plus_low_rank(q, scaled, v, -scaled, np.exp(g) * k, g, initial_state=S)
    expected = delta_rule(q, k, v, beta, g, initial_state=S)
    names = ("output", "final state")
    assert_close(dict(zip(names, general)), dict(zip(names, expected)), 2e-5)


def test_rwkv7():
    """The recurrence as RWKV-7 writes it, S_t = S_{t-1} (diag(w) - kk^T (eta * kk)) + v^T k,
    against the docstring's map."""
    rng = np.random.default_rng(0)
    T, K, V = 20, 8, 12
    r, k, kk = _normal(rng, T, K), _normal(rng, T, K), _unit(rng, T, K)
    v, eta, w = _normal(rng, T, V), rng.random((T, K)), 0.5 + 0.5 * rng.random((T, K))
    S_VK, outputs = np.zeros((V, K)), []
    for t in range(T):
        S_VK = S_VK @ (np.diag(w[t]) - np.outer(kk[t], eta[t] * kk[t])) + np.outer(v[t], k[t])
        outputs.append(S_VK @ r[t])
    arrays = (r, k, v, -(eta * kk), kk, np.log(w))
    o, S = diagonal_plus_low_rank(
        *(jnp.asarray(x, jnp.float32)[None, :, None] for x in arrays), scale=1.0
    )
    assert_close(
        {"output": o, "final state": S},
        {"output": np.array(outputs)[None, :, None], "final state": S_VK.T[None, None]},
        2e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "per_channel weak"])
def test_many_heads_and_tokens_in_blocks(decay):
    """More chunks than one block holds, and a last block that is not full."""
    inputs = inputs_of(DELTA_RULE, Shape(B=1, T=300, H=16, G=16, K=4, V=4), decay)
    got = everything(DELTA_RULE, "chunked", inputs)
    assert_close(got, truth(DELTA_RULE, inputs), 2e-5)


@pytest.mark.slow
def test_rounding_where_it_is_not_held_down():
    """Up to `compensated.REFLECTING` an error's sum stays small without more: one key at every
    token, as long as one likes."""
    inputs = inputs_of(DELTA_RULE, Shape(B=1, T=2000, H=1, G=1, K=16, V=4), "one key, beta 2")
    inputs["beta"] = np.full_like(inputs["beta"], 1.0099)
    got = everything(DELTA_RULE, "chunked", inputs)
    assert_close(got, truth(DELTA_RULE, inputs), 2e-5)


@pytest.mark.parametrize(
    "decay, channels, packed",
    [
        (0.0, (), True),
        (-1e-6, (), False),
        pytest.param(0.0, (), False, marks=pytest.mark.slow),
        pytest.param(-1e-6, (8,), False, marks=pytest.mark.slow),
    ],
)
def test_rounding_is_held_down_where_decay_is_slight(decay, channels, packed):
    """Reflections by one key for 10,000 tokens: an error of up to 9e-4, as without a decay."""
    rng, T = np.random.default_rng(0), 10_000
    q, v = _normal(rng, 1, T, 1, 8), _normal(rng, 1, T, 1, 8)
    k = np.repeat(_unit(rng, 1, 1, 1, 8), T, axis=1)
    beta = np.full((1, T, 1), 2, np.float32)
    log_decay = np.full((1, T, 1, *channels), decay, np.float32)
    ids = (np.arange(T) >= T // 10).astype(np.int32)[None] if packed else None
    inputs = q, k, v, beta, log_decay
    with jax.enable_x64(True):
        wide = (x.astype(np.float64) for x in inputs)
        expected = np.asarray(delta_rule(*wide, segment_ids=ids, implementation="reference")[0])
    o = np.asarray(jax.jit(delta_rule)(*inputs, segment_ids=ids)[0])
    error = np.sqrt(np.mean((o - expected) ** 2, axis=-1)).max()
    assert error < 9e-4 * np.sqrt(np.mean(expected**2))


def test_where_rounding_is_held_down():
    """Where some token reflects and the window around it keeps its state; one answer for a batch
    that vmap adds."""

    def occurs(size, *decays):
        sizes_BTH = jnp.ones((1, 40, 2)).at[0, 20, 1].set(size)
        log_decay_BTHK = jnp.full((1, 40, 2, 3), -0.2)
        for tokens, decay in decays:
            log_decay_BTHK = log_decay_BTHK.at[0, tokens, 1, 2].set(decay)
        return compensated.needed(sizes_BTH, log_decay_BTHK)

    window = slice(16, 32)
    assert not occurs(1.0, (window, 0.0))
    assert not occurs(2.0)
    assert occurs(2.0, (window, -0.01))
    assert occurs(jnp.nan, (window, -0.01))
    assert not occurs(2.0, (slice(0, 16), 0.0))
    assert not occurs(2.0, (window, 0.0), (18, -1000.0))
    assert jax.vmap(compensated.needed, in_axes=(0, None))(jnp.full((3, 1, 9, 1), 2.0), None).all()


def test_wrong_arguments():
    x = inputs_of(DELTA_RULE, Shape(T=5), "none")
    call = {n: x[n] for n in ("q", "k", "v", "beta")}
    for change, message in (
        ({"beta": x["beta"][:, :4]}, r"beta has shape \(2, 4, 2\); expected \(2, 5, 2\)"),
        ({"beta": x["beta"].astype(int)}, "beta has dtype int"),
        ({"implementation": "fast"}, "unknown implementation 'fast'; choose one of .*'chunked'"),
        ({"chunk_size": 24}, "chunk_size is 24; expected a power of two"),
        ({"log_decay": x["beta"][0]}, "log_decay has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            DELTA_RULE.call({**call, **change})
    with jax.enable_x64(True):  # a wide gate alone does not change the state that a loop carries
        token = {n: z[:, :1].astype(np.float32) for n, z in call.items()}
        wide = np.zeros((2, 1, 2))
        _, state = jax.eval_shape(DELTA_RULE.call, {**token, "log_decay": wide})
    assert state.dtype == np.float32
    with pytest.raises(
        NotImplementedError, match="'one_token' cannot run here: it takes one token; got T = 5"
    ):
        DELTA_RULE.call({**call, "implementation": "one_token"})
    with pytest.raises(ValueError, match=r"a has shape \(2, 5, 2, 4\); expected \(2, 5, 2, 8\)"):
        diagonal_plus_low_rank(x["q"], x["k"], x["v"], x["q"][..., :4], x["k"])


def test_published_shapes_fit():
    for name, shape in {
        **SHAPES,
        **{f"low rank {n}": s for n, s in DIAGONAL_PLUS_LOW_RANK_SHAPES.items()},
    }.items():
        B, T, G, H, K, V = (shape[n] for n in "BTGHKV")
        decay = {"none": None, "per_token": (B, T, H), "per_channel": (B, T, H, K)}[shape["decay"]]
        sizes = [(B, T, G, K), (B, T, G, K), (B, T, H, V)]
        low_rank = name.startswith("low rank")
        sizes += [(B, T, H, K)] * 2 if low_rank else [(B, T, H)]
        arrays = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
        log_decay = None if decay is None else jax.ShapeDtypeStruct(decay, jnp.float32)
        operator = diagonal_plus_low_rank if low_rank else delta_rule
        o, S = jax.eval_shape(operator, *arrays, log_decay)
        assert o.shape == (B, T, H, V) and S.shape == (B, H, K, V), name
