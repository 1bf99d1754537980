"""Kinds of decay, and decays between tokens of a chunk against plain float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import decay, matmul


def _log_decay(C, K, seed=0):
    """Weak and strong decays, with resets at token 5 and in one channel of token 9."""
    rng = np.random.default_rng(seed)
    log_decay = -np.choose(rng.integers(0, 3, (C, K)), [1e-3, 0.5, 50.0]) * rng.random((C, K))
    log_decay[5 % C] = decay.RESET
    log_decay[9 % C, 0] = decay.RESET
    return log_decay.astype(np.float32)


def _between(log_decay_CK, exclusive):
    """D_ij (exclusive: D_{i-1,j}) of each pair and channel, by slices: (C, C, K), float64."""
    C, K = log_decay_CK.shape
    D_CCK = np.zeros((C, C, K))
    for i in range(C):
        for j in range(i if exclusive else i + 1):
            stop = i if exclusive else i + 1
            D_CCK[i, j] = np.exp(log_decay_CK[j + 1 : stop].astype(np.float64).sum(axis=0))
    return D_CCK


@pytest.mark.parametrize(
    "shape, kind",
    [
        ((3,), "per_head"),
        ((2, 5, 3), "per_token"),
        ((2, 5, 3, 1), "per_token"),
        ((2, 5, 3, 8), "per_channel"),
        ((4, 2, 3, 16, 1), "per_token"),  # in chunks
        ((4, 2, 3, 16, 8), "per_channel"),
    ],
)
def test_kind_of_a_decay(shape, kind):
    assert decay.kind(jnp.zeros(shape)) == kind
    assert decay.kind(None) == "none" and decay.kind(None, segment_ids=1) == "per_token"


def test_documents_start_with_a_reset():
    ids_BT = np.array([[1, 1, 2, 2, 1]])
    reset = np.array([0, 0, decay.RESET, 0, decay.RESET], np.float32)
    assert decay.with_resets(None, None, jnp.float32) is None
    np.testing.assert_array_equal(decay.with_resets(None, ids_BT, np.float32)[0, :, 0, 0], reset)
    g_BTHK = np.full((1, 5, 2, 3), -0.5, np.float32)
    expected = np.where(reset < 0, reset, np.float32(-0.5))[None, :, None, None]
    np.testing.assert_array_equal(
        decay.with_resets(g_BTHK, ids_BT, np.float32), np.broadcast_to(expected, g_BTHK.shape)
    )


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("C", [1, 8, 16, 64, pytest.param(512, marks=pytest.mark.slow)])
def test_decays_are_right_to_float32(C, exclusive):
    K = 3
    log_decay_CK = _log_decay(C, K)
    D_CCK = _between(log_decay_CK, exclusive)
    rng = np.random.default_rng(1)
    q_CK, k_CK = rng.standard_normal((2, C, K)).astype(np.float32)

    @jax.jit
    def compute(log_decay_CK):
        sums = decay.chunk_sums(log_decay_CK)
        scores_CC = decay.decayed_scores(q_CK, k_CK, sums, exclusive=exclusive)
        D_CC = decay.pair_decay(log_decay_CK[:, 1:2], exclusive=exclusive)
        return sums, D_CC, decay.naive_pair_decay(log_decay_CK, exclusive=exclusive), scores_CC

    sums, D_CC, naive_CCK, scores_CC = compute(log_decay_CK)
    np.testing.assert_allclose(D_CC, D_CCK[:, :, 1], rtol=1e-5, atol=1e-35)
    # One exponential of a float32 sum: the sum is right to float32, so a decay of e^-67 to 67 eps.
    some_CCK = D_CCK > 1e-35
    exact, got = np.log(D_CCK[some_CCK]), np.log(np.float64(naive_CCK[some_CCK]))
    np.testing.assert_allclose(got, exact, rtol=4e-7, atol=2e-7)
    assert np.all(naive_CCK[~some_CCK] < 2e-35)
    expected_CC = np.einsum("iK,jK,ijK->ij", q_CK, k_CK, D_CCK)
    np.testing.assert_allclose(scores_CC, expected_CC, atol=1e-5)

    exact = log_decay_CK.astype(np.float64)
    for i in range(C):
        expected = (exact[: i + 1], exact[:i], exact[i + 1 :])
        got = (sums.g_cumsum_CK, sums.g_exclusive_CK, sums.g_reversed_CK)
        for part, x in zip(expected, got):
            np.testing.assert_allclose(np.exp(x[i]), np.exp(part.sum(0)), rtol=2e-5, atol=1e-35)
    np.testing.assert_allclose(np.exp(sums.g_total_K), np.exp(exact.sum(0)), rtol=2e-5, atol=1e-35)


@pytest.mark.parametrize("width", [1, 2])
def test_a_program_does_not_hold_the_pairs_of_a_long_chunk(width):
    """Masks of 2048 x 2048 are made as it runs: as constants they took 109 MB."""

    def gradients(log_decay_CK):
        def results(log_decay_CK):
            sums = decay.chunk_sums(log_decay_CK, levels=width > 1)
            return sums, decay.pair_decay(log_decay_CK[:, :1])

        outputs, vjp = jax.vjp(results, log_decay_CK)
        return outputs, vjp(outputs)

    for C in (2048, 8192):
        text = jax.jit(gradients).lower(jax.ShapeDtypeStruct((C, width), jnp.float32)).as_text()
        assert len(text) < C * C


def test_no_gradient_passes_a_reset_and_none_is_nan():
    log_decay_CK = _log_decay(32, 3)

    def total(log_decay_CK):
        sums = decay.chunk_sums(log_decay_CK)
        ones_CK = jnp.ones((32, 3))
        scores_CC = decay.decayed_scores(ones_CK, ones_CK, sums)
        D_CC = decay.pair_decay(log_decay_CK[:, :1])
        return scores_CC.sum() + D_CC.sum() + jnp.exp(sums.g_total_K).sum()

    gradient_CK = jax.jit(jax.grad(total))(log_decay_CK)
    assert np.isfinite(gradient_CK).all() and np.abs(gradient_CK).max() > 0
    np.testing.assert_array_equal(gradient_CK[log_decay_CK == decay.RESET], 0.0)


def test_a_chunk_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="must be a power of two; got 48"):
        decay.chunk_sums(jnp.zeros((48, 1)))


def test_products_of_narrow_inputs_are_exact_to_float32_and_so_is_the_backward_pass():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in rng.standard_normal((2, 33, 17)))
    exact_x, exact_y = (np.asarray(a, np.float64) for a in (x, y))
    weights = rng.standard_normal((33, 33)).astype(np.float32)

    out, vjp = jax.vjp(lambda x, y: matmul.einsum("ik,jk->ij", x, y), x, y)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact_x @ exact_y.T, atol=1e-5)
    dx, dy = vjp(jnp.asarray(weights))
    assert dx.dtype == dy.dtype == jnp.bfloat16
    np.testing.assert_allclose(dx.astype(np.float32), weights @ exact_y, rtol=2**-8, atol=1e-5)

    mixed, vjp = jax.vjp(lambda w: matmul.einsum("ij,jk->ik", w, y), jnp.asarray(weights))
    np.testing.assert_allclose(mixed, weights @ exact_y, atol=1e-5)
    np.testing.assert_allclose(vjp(mixed)[0], np.asarray(mixed) @ exact_y.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [5, 128, 300])
def test_sums_of_a_shard(T):
    """Decays from its start and to its end, with resets, and their gradients, against float64."""
    rng = np.random.default_rng(T)
    g_BTHX = -rng.exponential(0.1, (2, T, 2, 3))
    g_BTHX[0, T // 2, 0] = decay.RESET
    g_BTHX[1, 3:200, 1] *= 500
    later_BTHX = np.concatenate([g_BTHX[:, 1:], np.zeros_like(g_BTHX[:, :1])], axis=1)
    expected = {
        decay.g_cumsum: np.exp(np.cumsum(g_BTHX, axis=1)),
        decay.g_reversed: np.exp(np.cumsum(later_BTHX[:, ::-1], axis=1)[:, ::-1]),
    }
    for sums, decay_BTHX in expected.items():
        got, vjp = jax.vjp(lambda g, sums=sums: jnp.exp(sums(g)), g_BTHX.astype(np.float32))
        np.testing.assert_allclose(got, decay_BTHX, rtol=2e-5, atol=1e-30)
        (d_g_BTHX,) = vjp(jnp.ones_like(got))
        if sums is decay.g_cumsum:
            d_expected = np.cumsum(decay_BTHX[:, ::-1], axis=1)[:, ::-1]
        else:
            earlier_BTHX = np.roll(decay_BTHX, 1, axis=1)
            earlier_BTHX[:, 0] = 0
            d_expected = np.cumsum(earlier_BTHX, axis=1)
        d_expected = np.where(g_BTHX == decay.RESET, 0, d_expected)
        np.testing.assert_allclose(d_g_BTHX, d_expected, rtol=2e-5, atol=1e-20)
