"""Triton kernels of the delta rule: the inverse that couples the tokens of a chunk, and the states.

The equations are those of docs/math/delta_rule.md: (I + A) U = R = beta (v - (k exp(g_cumsum)) S)
with A = beta (k k^T * D) below the diagonal. What follows from U is linear attention with y = U for
values (`gpu/chunks.py`). The inverse is by substitution in blocks of 16, which are then joined in
pairs; never by powers.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.blocks import (
    dot,
    head,
    load_g_cumsum,
    load_g_reversed,
    load_g_total,
    load_tile,
    pair_decay,
    store_tile,
)


@triton.jit
def _inverse(A, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Computes (I + A)^-1 for A (C, C) strictly lower triangular, C = 16 * 2^LEVELS."""
    M: tl.constexpr = C // 16
    block = tl.arange(0, M)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    # Diagonal blocks of 16, all at once, row by row: X_i -= sum_j A_ij X_j.
    A_MUU = tl.sum(tl.where(same, tl.reshape(A, (M, 16, M, 16)), 0.0), axis=2)
    X_MUU = tl.where(i == j, tl.full((M, 16, 16), 1.0, A.dtype), 0.0)
    for row in range(1, 16):
        A_MU = tl.sum(tl.where(i == row, A_MUU, 0.0), axis=1)
        known_MU = tl.sum(A_MU[:, :, None] * X_MUU, axis=1)
        X_MUU -= tl.where(i == row, known_MU[:, None, :], 0.0)
    # Back to a block diagonal matrix.
    X_MUMU = tl.broadcast_to(tl.reshape(X_MUU, (M, 16, 1, 16)), (M, 16, M, 16))
    X = tl.reshape(tl.where(same, X_MUMU, 0.0), (C, C))
    # Joins neighbours, X <- X - X A21 X.
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    for level in tl.static_range(LEVELS):
        pair = r // (32 << level) == c // (32 << level)
        below = pair & (r // (16 << level) > c // (16 << level))
        A21 = tl.where(below, A, 0.0)
        X -= dot(dot(X, A21, PRECISION), X, PRECISION)
    return X


@triton.jit
def inverses(
    k, beta, g, scores, out,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr, MIXED: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes (I + A)^-1 of one chunk, stored as out (B, H, N, C, C).

    scores: k k^T * D below the diagonal, if decay is per channel. EXACT: in float64, stored as two
      float32 terms (B, H, N, 2, C, C).
    """
    n = tl.program_id(0)
    bh, key, value, gate = head(T, XH, H, GH)
    k += key * K
    g += gate * GK
    at = bh * tl.cdiv(T, C) + n
    # A = beta (k k^T * D) below the diagonal
    if GK > 1:
        A = load_tile(scores + at * C * C, C, 0, C, 0, C, C, C)
    else:
        A = tl.full((C, C), 0.0, tl.float64 if EXACT else tl.float32)
        for k0 in range(0, K, BK):
            k_CK = load_tile(k, XH * K, n * C, T, k0, K, C, BK)
            A += dot(k_CK, tl.trans(k_CK), MIXED)
        A *= pair_decay(g, GH * GK, n * C, T, C, True)
    A *= load_tile(beta + value, H, n * C, T, 0, 1, C, 1)
    X = _inverse(A, C, LEVELS, SUMS)
    if EXACT:  # float64 as two float32 terms
        high = X.to(tl.float32).to(tl.float64)
        store_tile(out + at * 2 * C * C, C, 0, C, 0, C, high, C, C)
        store_tile(out + (at * 2 + 1) * C * C, C, 0, C, 0, C, X - high, C, C)
    else:
        store_tile(out + at * C * C, C, 0, C, 0, C, X, C, C)


@triton.jit
def _load_inverse(X, at, C: tl.constexpr, EXACT: tl.constexpr):
    """Loads the inverse (C, C) that `inverses` stored for chunk `at` = (b * H + h) * N + n. EXACT:
    as float64, the sum of its two float32 terms."""
    if EXACT:
        X += at * 2 * C * C
        X_CC = load_tile(X, C, 0, C, 0, C, C, C).to(tl.float64)
        X_CC += load_tile(X + C * C, C, 0, C, 0, C, C, C).to(tl.float64)
    else:
        X_CC = load_tile(X + at * C * C, C, 0, C, 0, C, C, C)
    return X_CC


@triton.jit
def writes(
    k, v, beta, g, X, start, u, out, final,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, EXACT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes U, the states that enter the chunks (out), and the final state. X:
    the inverses. A program walks all chunks for one block of V of one head; BK covers all of K."""
    v0 = tl.program_id(0) * BV
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    k += key * K
    v += value * V
    u += value * V
    beta += value
    g += gate * GK
    S = load_tile(start + bh * K * V, V, 0, K, v0, V, BK, BV).to(
        tl.float64 if EXACT else tl.float32
    )
    for n in range(N):
        store_tile(out + (bh * N + n) * K * V, V, 0, K, v0, V, S, BK, BV)
        k_CK = load_tile(k, XH * K, n * C, T, 0, K, C, BK)
        exp_g_cumsum = tl.exp(load_g_cumsum(g, GH * GK, n * C, T, 0, GK, C, BG))
        exp_g_reversed = tl.exp(load_g_reversed(g, GH * GK, n * C, T, 0, GK, C, BG))
        # R = beta (v - (k exp(g_cumsum)) S)
        if GK > 1:
            read_CV = dot(k_CK * exp_g_cumsum, S, MIXED)
        else:
            read_CV = exp_g_cumsum * dot(k_CK, S, MIXED)
        v_CV = load_tile(v, H * V, n * C, T, v0, V, C, BV)
        R_CV = load_tile(beta, H, n * C, T, 0, 1, C, 1) * (v_CV - read_CV)
        # U = (I + A)^-1 R
        X_CC = _load_inverse(X, bh * N + n, C, EXACT)
        U_CV = dot(X_CC, R_CV, MIXED)
        store_tile(u, H * V, n * C, T, v0, V, U_CV, C, BV)
        # S' = exp(g_total) S + (k exp(g_reversed))^T U
        S *= tl.exp(load_g_total(g, GH * GK, n * C, T, 0, GK, C, BG))
        if GK > 1:
            S += dot(tl.trans(k_CK * exp_g_reversed), U_CV, MIXED)
        else:
            S += dot(tl.trans(k_CK), exp_g_reversed * U_CV, MIXED)
    store_tile(final + bh * K * V, V, 0, K, v0, V, S, BK, BV)


@triton.jit
def gradients_of_writes(
    q, k, beta, g, X, do, du, dfinal, dr, out, dstart,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dR = (I + A)^-T dU, for (I + A) U = R, and the states' cotangents.

    du: the part of dU through the outputs of U's own chunk. X: the inverses of I + A.
    out: cotangents of the states that leave the chunks. dfinal, dstart: of the final and initial
      state.
    A program walks the chunks in reverse for one block of V of one head; BK covers all of K.
    """
    v0 = tl.program_id(0) * BV
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    q += key * K
    k += key * K
    beta += value
    g += gate * GK
    at = value * V
    dS = load_tile(dfinal + bh * K * V, V, 0, K, v0, V, BK, BV).to(
        tl.float64 if EXACT else tl.float32
    )
    for step in range(N):
        n = N - 1 - step
        store_tile(out + (bh * N + n) * K * V, V, 0, K, v0, V, dS, BK, BV)
        k_CK = load_tile(k, XH * K, n * C, T, 0, K, C, BK)
        exp_g_reversed = tl.exp(load_g_reversed(g, GH * GK, n * C, T, 0, GK, C, BG))
        # dU = scale Z^T do + (k exp(g_reversed)) dS';  dR = (I + A)^-T dU
        dU_CV = load_tile(du + at, H * V, n * C, T, v0, V, C, BV)
        if GK > 1:
            dU_CV += dot(k_CK * exp_g_reversed, dS, MIXED)
        else:
            dU_CV += exp_g_reversed * dot(k_CK, dS, MIXED)
        X_CC = _load_inverse(X, bh * N + n, C, EXACT)
        dR_CV = dot(tl.trans(X_CC), dU_CV, MIXED)
        store_tile(dr + at, H * V, n * C, T, v0, V, dR_CV, C, BV)
        # dS = exp(g_total) dS' + scale (q exp(g_cumsum))^T do - (beta k exp(g_cumsum))^T dR
        exp_g_cumsum = tl.exp(load_g_cumsum(g, GH * GK, n * C, T, 0, GK, C, BG))
        dS *= tl.exp(load_g_total(g, GH * GK, n * C, T, 0, GK, C, BG))
        q_CK = load_tile(q, XH * K, n * C, T, 0, K, C, BK)
        do_CV = load_tile(do + at, H * V, n * C, T, v0, V, C, BV)
        dR_CV *= load_tile(beta, H, n * C, T, 0, 1, C, 1)
        if GK > 1:
            dS += SCALE * dot(tl.trans(q_CK * exp_g_cumsum), do_CV, MIXED)
            dS -= dot(tl.trans(k_CK * exp_g_cumsum), dR_CV, MIXED)
        else:
            dS += SCALE * dot(tl.trans(q_CK), exp_g_cumsum * do_CV, MIXED)
            dS -= dot(tl.trans(k_CK), exp_g_cumsum * dR_CV, MIXED)
    store_tile(dstart + bh * K * V, V, 0, K, v0, V, dS, BK, BV)
