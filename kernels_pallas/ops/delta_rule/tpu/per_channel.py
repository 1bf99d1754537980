"""One chunk of the delta rule inside a TPU kernel, with a decay per key channel.

As `per_token.py`, with the decays inside the products. A chunk is halved again and again
(docs/math/linear_attention.md, "Per channel"): tokens j < i part at one level, and there the decay
between them is exp(g_reversed_j) exp(g_cumsum_i), two exponentials of sums from that level's
middle. A token is in one half only, so a level has one exponential per token and channel.

    level l   E = exp(g_reversed_j) in left halves of 2^l tokens, exp(g_cumsum_i) in right halves;
              (k E)(k E)^T and (q E)(k E)^T, of which A and Z take the pairs that part there
    A = beta * those of k           Z = scale * those of q, and q_i . k_i on the diagonal
    R = beta * (v - (k exp(g_cumsum)) S)            U = (I + A)^-1 R
    o = scale * (q exp(g_cumsum)) S + Z U           S' = exp(g_total) S + (k exp(g_reversed))^T U
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas.ops.delta_rule.tpu.per_token import ChunkGradients, solve
from kernels_pallas.tpu import primitives
from kernels_pallas.tpu.primitives import Products, column_of, iota, lower, row_of, row_sums


class Gates(NamedTuple):
    """Fields of one head's gates in a chunk: beta (C, 1) and the log decay per channel (C, K)."""

    beta_C1: jnp.ndarray
    g_CK: jnp.ndarray


class Chunk(NamedTuple):
    """Arrays of a chunk's forward pass that its backward pass reads again, for one head.

    levels: per level of halving, the decay E (C, K) between a token and the middle of its block.
    kk_CC: k D k^T. A_rest_CC: A's rounding error, in `exact` calls. X_CC: (I + A)^-1.
    read_CV: v - (k exp(g_cumsum)) S, so that R = beta * read.
    """

    levels: list[jnp.ndarray]
    exp_g_cumsum_CK: jnp.ndarray
    exp_g_reversed_CK: jnp.ndarray
    kk_CC: jnp.ndarray
    A_CC: jnp.ndarray
    A_rest_CC: jnp.ndarray | None
    X_CC: jnp.ndarray
    Z_CC: jnp.ndarray
    read_CV: jnp.ndarray
    U_CV: jnp.ndarray


def gates_of(p: Products, heads: int, rows_RC, g_CHK) -> list[Gates]:
    """Returns the Gates of every head of a grid step. rows_RC: beta, one row per head. g_CHK: log
    decay (C, heads * K), heads side by side."""
    columns_CR = rows_RC.T
    K = g_CHK.shape[1] // heads
    return [Gates(columns_CR[:, h : h + 1], g_CHK[:, h * K : (h + 1) * K]) for h in range(heads)]


def _parting(C, rows=1, columns=1):
    """Returns i xor j, whose highest bit is the halving level that separates tokens i and j."""
    shape = (rows * C, columns * C)
    return (iota(shape, 0) % C) ^ (iota(shape, 1) % C)


def _chunk(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    C = k_CK.shape[0]
    sums = primitives.halving_sums(gates.g_CK)
    exp_g_cumsum_CK, exp_g_reversed_CK, *levels = (jnp.exp(x) for x in sums)
    yield
    # q D k^T and k D k^T, level by level: a pair keeps the product of the level at which it parts.
    qk_CC, kk_CC = row_sums(q_CK * k_CK), jnp.zeros((C, C), jnp.float32)
    A_rest_CC: Any = kk_CC if p.exact else None
    for level, E_CK in enumerate(levels):
        kE_CK = k_CK * E_CK
        both = p.dot(jnp.concatenate([q_CK * E_CK, kE_CK], axis=0), kE_CK, (1, 1))
        here = _parting(C) >= 1 << level
        qk_CC, kk_CC = jnp.where(here, both[:C], qk_CC), jnp.where(here, both[C:], kk_CC)
        if p.exact:
            exact_CC, rest_CC = p.exact_product(kE_CK, kE_CK, (1, 1))
            A_rest_CC = jnp.where(here, (exact_CC - both[C:]) + rest_CC, A_rest_CC)
        yield
    A_CC = jnp.where(lower(C, strict=True), gates.beta_C1 * kk_CC, 0.0)
    if p.exact:
        A_rest_CC = jnp.where(lower(C, strict=True), gates.beta_C1 * A_rest_CC, 0.0)
    Z_CC = jnp.where(lower(C), scale * qk_CC, 0.0)
    X_CC = yield from primitives.inverse(p, A_CC)
    # R / beta = v - (k exp(g_cumsum)) S, then U
    read_CV = v_CV.astype(jnp.float32) - _state(p, k_CK * exp_g_cumsum_CK, S_KV)
    yield
    U_CV = solve(p, A_CC, A_rest_CC, X_CC, gates.beta_C1 * read_CV, 1)
    yield
    decays = levels, exp_g_cumsum_CK, exp_g_reversed_CK
    return Chunk(*decays, kk_CC, A_CC, A_rest_CC, X_CC, Z_CC, read_CV, U_CV)


def _state(p, x, y, axes=(1, 0)):
    """Multiplies x and y, which carry a state across chunks: with one rounding if `p.exact`."""
    return p.state(x, y, axes) if p.exact else p.dot(x, y, axes)


def forward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    """Computes one head's o (C, V) and the state S' (K, V) that leaves the chunk. S_KV: the state
    that enters the chunk. A generator, for `primitives.in_turns`."""
    q_CK, k_CK = q_CK.astype(jnp.float32), k_CK.astype(jnp.float32)
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    C = k_CK.shape[0]
    # S' = exp(g_total) S + (k exp(g_reversed))^T U
    local_KV = _state(p, k_CK * c.exp_g_reversed_CK, c.U_CV, (0, 0))
    S_next_KV = column_of(c.exp_g_cumsum_CK[C - 1 :]) * S_KV + local_KV
    yield
    # o = scale (q exp(g_cumsum)) S + Z U
    o_CV = scale * p.dot(q_CK * c.exp_g_cumsum_CK, S_KV)
    yield
    o_CV = o_CV + p.dot(c.Z_CC, c.U_CV)
    yield
    return o_CV, S_next_KV


def backward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV, do_CV, dS_KV):
    """Computes one head's ChunkGradients from do and the cotangent dS' of the state that leaves.
    S_KV: the state that enters the chunk. A generator, for `primitives.in_turns`."""
    q_CK, k_CK = q_CK.astype(jnp.float32), k_CK.astype(jnp.float32)
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    C = k_CK.shape[0]
    beta_C1 = gates.beta_C1
    exp_g_cumsum_CK, exp_g_reversed_CK = c.exp_g_cumsum_CK, c.exp_g_reversed_CK
    exp_g_total_1K = exp_g_cumsum_CK[C - 1 :]
    # q and k as they read the entering state, k as the leaving state holds it.
    q_read_CK, k_read_CK = q_CK * exp_g_cumsum_CK, k_CK * exp_g_cumsum_CK
    k_local_CK = k_CK * exp_g_reversed_CK
    # dU = Z^T do + (k exp(g_reversed)) dS'
    dU_CV = _state(p, k_local_CK, dS_KV)
    yield
    dU_CV = dU_CV + p.dot(c.Z_CC, do_CV, (0, 0))
    yield
    # dR = (I + A)^-T dU;  dv = beta dR
    dR_CV = solve(p, c.A_CC, c.A_rest_CC, c.X_CC, dU_CV, 0)
    dv_CV = beta_C1 * dR_CV
    yield
    # dS = exp(g_total) dS' - (beta k exp(g_cumsum))^T dR + scale (q exp(g_cumsum))^T do
    dS_entering_KV = column_of(exp_g_total_1K) * dS_KV - _state(p, k_read_CK, dv_CV, (0, 0))
    yield
    dS_entering_KV = dS_entering_KV + scale * p.dot(q_read_CK, do_CV, (0, 0))
    yield
    # dA = -dR U^T (j < i);  dZ = scale do U^T (j <= i)
    dA_CC = jnp.where(lower(C, strict=True), -p.dot(dR_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dqk_CC = jnp.where(lower(C), scale * p.dot(do_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dkk_CC = beta_C1 * dA_CC
    # beta multiplies R and A.
    dbeta_C1 = row_sums(dR_CV * c.read_CV) + row_sums(dA_CC * c.kk_CC)

    # Parts of dq and dk that pass through a state, before its decay, and the pairs i = j.
    dq_read_CK = scale * p.dot(do_CV, S_KV, (1, 1))
    yield
    dk_read_CK = -p.dot(dv_CV, S_KV, (1, 1))
    yield
    dk_local_CK = p.dot(c.U_CV, dS_KV, (1, 1))
    yield
    dtotal_1K = row_of(row_sums(dS_KV * S_KV))
    diagonal_C1 = row_sums(jnp.where(_parting(C) == 0, dqk_CC, 0.0))
    dq_CK = dq_read_CK * exp_g_cumsum_CK + diagonal_C1 * k_CK
    dk_CK = dk_read_CK * exp_g_cumsum_CK + dk_local_CK * exp_g_reversed_CK + diagonal_C1 * q_CK
    dg_cumsum_CK = dq_read_CK * q_read_CK + dk_read_CK * k_read_CK
    dg_reversed_CK = dk_local_CK * k_local_CK
    yield

    # The other pairs, level by level: of the products (q E)(k E)^T and (k E)(k E)^T.
    dlevels = []
    dboth = jnp.concatenate([dqk_CC, dkk_CC], axis=0)
    dboth_T = jnp.concatenate([dqk_CC.T, dkk_CC.T], axis=1)
    for level, E_CK in enumerate(c.levels):
        here_rows, here_columns = (
            (x >= 1 << level) & (x < 2 << level) for x in (_parting(C, 2, 1), _parting(C, 1, 2))
        )
        qE_CK, kE_CK = q_CK * E_CK, k_CK * E_CK
        rows = p.dot(jnp.where(here_rows, dboth, 0.0), kE_CK)
        yield
        columns = p.dot(
            jnp.where(here_columns, dboth_T, 0.0),
            jnp.concatenate([qE_CK, kE_CK], axis=0),
        )
        yield
        dqE_CK, dkE_CK = rows[:C], rows[C:] + columns
        dq_CK, dk_CK = dq_CK + dqE_CK * E_CK, dk_CK + dkE_CK * E_CK
        dlevels.append(dqE_CK * qE_CK + dkE_CK * kE_CK)
    dg_CK = primitives.halving_sums_cotangent(dg_cumsum_CK, dg_reversed_CK, dlevels)
    dg_CK = dg_CK + dtotal_1K * exp_g_total_1K
    return ChunkGradients(dq_CK, dk_CK, dv_CV, row_of(dbeta_C1), dg_CK, dS_entering_KV)
