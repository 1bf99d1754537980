"""One chunk of the delta rule inside a TPU kernel, with no decay or one decay per token and head.

The equations are those of docs/math/delta_rule.md. Every decay is applied to what a product gives,
not to what goes in: q and k, the caller's own bfloat16 arrays, reach the matrix unit as they are.

    A = beta * (k k^T) D  below the diagonal        Z = scale * (q k^T) D  with it
    R = beta * (v - exp(g_cumsum) * k S)            U = (I + A)^-1 R
    o = scale * exp(g_cumsum) * q S + Z U           S' = exp(g_total) S + k^T (exp(g_reversed) * U)

D_ij = exp(g_{j+1} + ... + g_i) is the exponential of a product with zeros and ones, in which
nothing is subtracted. `per_channel.py` has the same functions for a decay per channel.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas.tpu import primitives
from kernels_pallas.tpu.primitives import Products, lower, row_of, row_sums


class Gates(NamedTuple):
    """Fields of one head's gates in a chunk: beta, and its decays (None if there is no decay)."""

    beta_C1: jnp.ndarray
    D_CC: jnp.ndarray | None = None
    exp_g_cumsum_C1: jnp.ndarray | None = None
    exp_g_reversed_C1: jnp.ndarray | None = None
    exp_g_total_11: jnp.ndarray | None = None


class Chunk(NamedTuple):
    """Arrays of a chunk's forward pass that its backward pass reads again, for one head.

    qk_CC, kk_CC: q k^T, k k^T. A_rest_CC: A's rounding error, in `exact` calls. X_CC: (I + A)^-1.
    kS_CV: exp(g_cumsum) k S. read_CV: v - kS, so that R = beta * read.
    """

    qk_CC: jnp.ndarray
    kk_CC: jnp.ndarray
    A_CC: jnp.ndarray
    A_rest_CC: jnp.ndarray | None
    X_CC: jnp.ndarray
    Z_CC: jnp.ndarray
    kS_CV: jnp.ndarray
    read_CV: jnp.ndarray
    U_CV: jnp.ndarray


class ChunkGradients(NamedTuple):
    """Fields are the gradients of one head's inputs in a chunk.

    dg: of log decay, None if there is none. dS_KV: of the state that enters the chunk.
    """

    dq_CK: jnp.ndarray
    dk_CK: jnp.ndarray
    dv_CV: jnp.ndarray
    dbeta_1C: jnp.ndarray
    dg: jnp.ndarray | None
    dS_KV: jnp.ndarray


def gates_of(p: Products, heads: int, rows_RC, g_CHK=None) -> list[Gates]:
    """Computes the Gates of every head of a grid step. rows_RC: a row per head of beta, then, with
    a decay per token, of log decay."""
    C = rows_RC.shape[1]
    if rows_RC.shape[0] == heads:
        columns_CR = rows_RC.T
        return [Gates(columns_CR[:, h : h + 1]) for h in range(heads)]
    beta_HC, g_HC = rows_RC[:heads], rows_RC[heads:]
    # g_cumsum and g_reversed of all heads, by products with zeros and ones; then as columns.
    up_to, behind = p.ones(lower(C)), p.ones(~lower(C))  # at (i, s): s <= i, s > i
    exp_g_cumsum_HC = jnp.exp(p.dot(g_HC, up_to, (1, 1)))
    exp_g_reversed_HC = jnp.exp(p.dot(g_HC, behind, (1, 1)))
    columns_CR = jnp.concatenate([beta_HC, exp_g_cumsum_HC, exp_g_reversed_HC], axis=0).T
    gates = []
    for h in range(heads):
        # D_ij sums s in j < s <= i.
        between_CC = p.dot(jnp.where(lower(C), g_HC[h : h + 1], 0.0), behind, (1, 1))
        beta_C1, exp_g_cumsum_C1, exp_g_reversed_C1 = (
            columns_CR[:, n : n + 1] for n in (h, heads + h, 2 * heads + h)
        )
        D_CC = jnp.where(lower(C), jnp.exp(between_CC), 0.0)
        exp_g_total_11 = exp_g_cumsum_HC[h : h + 1, C - 1 :]
        gates.append(Gates(beta_C1, D_CC, exp_g_cumsum_C1, exp_g_reversed_C1, exp_g_total_11))
    return gates


def _times(x, factor) -> Any:
    return x if factor is None else x * factor


def _chunk(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV) -> Generator[Any, Any, Chunk]:
    C = k_CK.shape[0]
    qk_CC, kk_CC = p.dot(q_CK, k_CK, (1, 1)), p.dot(k_CK, k_CK, (1, 1))
    yield

    def below(products_CC):
        return jnp.where(
            lower(C, strict=True), gates.beta_C1 * _times(products_CC, gates.D_CC), 0.0
        )

    # A and Z, and what A has lost to rounding.
    A_rest_CC = None
    if p.exact:
        exact_CC, rest_CC = p.exact_product(k_CK, k_CK, (1, 1))
        A_rest_CC = below((exact_CC - kk_CC) + rest_CC)
    A_CC = below(kk_CC)
    Z_CC = scale * (jnp.where(lower(C), qk_CC, 0.0) if gates.D_CC is None else qk_CC * gates.D_CC)
    X_CC = yield from primitives.inverse(p, A_CC)
    # R / beta = v - exp(g_cumsum) k S, then U
    kS_CV = _times(p.state(k_CK, S_KV), gates.exp_g_cumsum_C1)
    read_CV = v_CV.astype(jnp.float32) - kS_CV
    yield
    U_CV = solve(p, A_CC, A_rest_CC, X_CC, gates.beta_C1 * read_CV, 1)
    yield
    return Chunk(qk_CC, kk_CC, A_CC, A_rest_CC, X_CC, Z_CC, kS_CV, read_CV, U_CV)


def solve(p, A_CC, A_rest_CC, X_CC, R_CV, axis):
    """Computes (I + A)^-1 R, or with axis 0 (I + A)^-T R.

    X_CC: the inverse. A_rest_CC: A's rounding error or None; if given, the result is corrected once
      by its residual (docs/math/delta_rule.md, "Compensated products").
    """
    axes = (axis, 0)
    U_CV = p.precise(X_CC, R_CV, axes)
    if A_rest_CC is None:
        return U_CV
    # How large U is in each document by itself: what is multiplied by 0 must not change how the
    # rest is rounded.
    squares_CV = U_CV * U_CV
    linked_CC = p.ones((A_CC != 0) | (A_CC.T != 0))
    squares_CV = squares_CV + p.dot(linked_CC, squares_CV)
    # R - (I + A) U, with A U as two terms, solved for once more.
    exact_CV, rest_CV = p.exact_product(A_CC, U_CV, axes, squares_CV)
    residual_CV = R_CV - U_CV - exact_CV - (rest_CV + p.dot(A_rest_CC, U_CV, axes))
    return U_CV + p.dot(X_CC, residual_CV, axes)


def forward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    """Computes one head's o (C, V) and the state S' (K, V) that leaves the chunk. S_KV: the state
    that enters the chunk. A generator, for `primitives.in_turns`."""
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    # S' = exp(g_total) S + k^T (exp(g_reversed) U)
    local_KV = p.state(k_CK, _times(c.U_CV, gates.exp_g_reversed_C1), (0, 0))
    S_next_KV = _times(S_KV, gates.exp_g_total_11) + local_KV
    yield
    # o = scale exp(g_cumsum) q S + Z U
    o_CV = scale * _times(p.dot(q_CK, S_KV), gates.exp_g_cumsum_C1)
    yield
    o_CV = o_CV + p.dot(c.Z_CC, c.U_CV)
    yield
    return o_CV, S_next_KV


def backward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV, do_CV, dS_KV):
    """Computes one head's ChunkGradients from do and the cotangent dS' of the state that leaves.
    S_KV: the state that enters the chunk. A generator, for `primitives.in_turns`."""
    C = k_CK.shape[0]
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    beta_C1, D_CC, exp_g_cumsum_C1, exp_g_reversed_C1, exp_g_total_11 = gates
    # dU = Z^T do + exp(g_reversed) k dS'
    kdS_CV = p.state(k_CK, dS_KV)
    yield
    dU_CV = p.dot(c.Z_CC, do_CV, (0, 0)) + _times(kdS_CV, exp_g_reversed_C1)
    yield
    # dR = (I + A)^-T dU;  dv = beta dR
    dR_CV = solve(p, c.A_CC, c.A_rest_CC, c.X_CC, dU_CV, 0)
    dv_CV = beta_C1 * dR_CV
    # Cotangents of q S and, negated, of k S.
    minus_dkS_CV = _times(dv_CV, exp_g_cumsum_C1)
    dqS_CV = scale * _times(do_CV.astype(jnp.float32), exp_g_cumsum_C1)
    yield
    # dS = exp(g_total) dS' - (beta k exp(g_cumsum))^T dR + scale (q exp(g_cumsum))^T do
    dS_entering_KV = _times(dS_KV, exp_g_total_11) - p.state(k_CK, minus_dkS_CV, (0, 0))
    yield
    dS_entering_KV = dS_entering_KV + p.state(q_CK, dqS_CV, (0, 0))
    yield
    # dA = -dR U^T (j < i);  dZ = do U^T (j <= i)
    dA_CC = jnp.where(lower(C, strict=True), -p.dot(dR_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dZ_CC = jnp.where(lower(C), p.dot(do_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dkk_CC, dqk_CC = _times(beta_C1 * dA_CC, D_CC), _times(scale * dZ_CC, D_CC)
    # beta multiplies R and A.
    dbeta_C1 = row_sums(dR_CV * c.read_CV) + row_sums(_times(dA_CC * c.kk_CC, D_CC))
    dg_1C = None
    if D_CC is not None and exp_g_reversed_C1 is not None and exp_g_total_11 is not None:
        # dg: pairs dA * A + dZ * Z, what reads the entering state, what reaches the leaving one.
        pairs_CC = dA_CC * c.A_CC + dZ_CC * c.Z_CC
        dg_cumsum_C1 = row_sums(dqS_CV * p.dot(q_CK, S_KV) - dv_CV * c.kS_CV)
        yield
        dg_reversed_C1 = row_sums(c.U_CV * kdS_CV) * exp_g_reversed_C1
        dg_total_11 = jnp.sum(row_sums(dS_KV * S_KV), axis=0, keepdims=True) * exp_g_total_11
        dg_1C = _decay_gradient(p, pairs_CC, dg_cumsum_C1, dg_reversed_C1) + dg_total_11
        yield
    # dq and dk: from q S, k S, k^T U, and from the pairs.
    dq_CK = p.dot(dqS_CV, S_KV, (1, 1))
    yield
    dq_CK = dq_CK + p.dot(dqk_CC, k_CK)
    yield
    dk_CK = p.dot(_times(c.U_CV, exp_g_reversed_C1), dS_KV, (1, 1))
    yield
    dk_CK = dk_CK - p.dot(minus_dkS_CV, S_KV, (1, 1))
    yield
    dk_CK = dk_CK + p.dot(dqk_CC, q_CK, (0, 0))
    yield
    dk_CK = dk_CK + p.dot(dkk_CC, k_CK)
    yield
    dk_CK = dk_CK + p.dot(dkk_CC, k_CK, (0, 0))
    yield
    return ChunkGradients(dq_CK, dk_CK, dv_CV, row_of(dbeta_C1), dg_1C, dS_entering_KV)


def _decay_gradient(p, pairs_CC, dg_cumsum_C1, dg_reversed_C1):
    """Computes dg_s (1, C) of a chunk from cotangents of sums of log decay, but for g_total's. It
    sums dD_ij D_ij (pairs_CC) of j < s <= i, dg_cumsum_i of i >= s, dg_reversed_j of j < s."""
    C = pairs_CC.shape[0]
    between_CC = p.dot(pairs_CC, p.ones(~lower(C))) + dg_cumsum_C1
    return jnp.sum(jnp.where(lower(C), between_CC, dg_reversed_C1), axis=0, keepdims=True)
