"""delta_rule and diagonal_plus_low_rank: the conformance suite, and what only these operators
promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import delta_rule, diagonal_plus_low_rank
from kernels_pallas.common import regimes
from kernels_pallas.ops.delta_rule import api, compensated, step, step_diagonal_plus_low_rank
from kernels_pallas.ops.delta_rule.shapes import DIAGONAL_PLUS_LOW_RANK_SHAPES, SHAPES
from tests.kernels_pallas.ops.conformance import (
    Shape,
    Suite,
    assert_close,
    by_position,
    everything,
    inputs_of,
    suite_case,
    truth,
)

DELTA_RULE = suite_case(
    api.OPERATOR,
    implementations=(
        "chunked",
        "naive_chunk",
    ),
    step=by_position(step, "q", "k", "v", "beta"),
    typical=("per_token weak",),
    fast=(
        *((100, "one key, beta 2"), (100, "per_channel mixed"), (100, "per_channel extreme")),
        (100, "one key, beta 2 per_channel zero"),
        *((100, "per_token extreme"), (100, "per_token resets")),
    ),
)
DIAGONAL_PLUS_LOW_RANK = suite_case(
    api.DIAGONAL_PLUS_LOW_RANK,
    implementations=(
        "chunked",
        "naive_chunk",
    ),
    step=by_position(step_diagonal_plus_low_rank, "q", "k", "v", "a", "b"),
    typical=("per_channel weak",),
    fast=(),
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
    r, k, kk = regimes.normal(rng, T, K), regimes.normal(rng, T, K), regimes.unit(rng, T, K)
    v, eta, w = regimes.normal(rng, T, V), rng.random((T, K)), 0.5 + 0.5 * rng.random((T, K))
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
    q, v = regimes.normal(rng, 1, T, 1, 8), regimes.normal(rng, 1, T, 1, 8)
    k = np.repeat(regimes.unit(rng, 1, 1, 1, 8), T, axis=1)
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
