"""Triton kernels of the delta rule: what couples the tokens of a chunk, and the states.

With `triton_chunks`' names, token i of a chunk writes u_i = beta_i (v_i - pred_i), where pred = (k
exp(through)) S + (k k^T * D) u is what its key finds. So (I + A) U = beta (v - (k exp(through)) S),
A = beta (k k^T * D) below the diagonal (the UT form: DeltaNet, arXiv 2406.06484, section 3.2; with
decay, Gated DeltaNet, 2412.06464, section 3.3). What follows from U is linear attention with U for
values. The inverse is by substitution in blocks of 16, which are then joined in pairs, X <- X - X S
X with S what lies below them; never by powers.
"""

import triton
import triton.language as tl

from kernels_pallas.gpu.blocks import (
    dot,
    load_g_cumsum,
    load_g_reversed,
    load_g_total,
    load_tile,
    pair_decay,
    store_tile,
)


@triton.jit
def _inverse(A, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular (C, C), C = 16 * 2^LEVELS."""
    M: tl.constexpr = C // 16
    block = tl.arange(0, M)
    same = (block[:, None] == block[None, :])[:, None, :, None]
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    A_MUU = tl.sum(tl.where(same, tl.reshape(A, (M, 16, M, 16)), 0.0), axis=2)
    X_MUU = tl.where(i == j, tl.full((M, 16, 16), 1.0, A.dtype), 0.0)
    for row in range(1, 16):
        A_MU = tl.sum(tl.where(i == row, A_MUU, 0.0), axis=1)
        known_MU = tl.sum(A_MU[:, :, None] * X_MUU, axis=1)
        X_MUU -= tl.where(i == row, known_MU[:, None, :], 0.0)
    X_MUMU = tl.broadcast_to(tl.reshape(X_MUU, (M, 16, 1, 16)), (M, 16, M, 16))
    X = tl.reshape(tl.where(same, X_MUMU, 0.0), (C, C))
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    for level in tl.static_range(LEVELS):
        pair = r // (32 << level) == c // (32 << level)
        below = pair & (r // (16 << level) > c // (16 << level))
        S = tl.where(below, A, 0.0)
        X -= dot(dot(X, S, PRECISION), X, PRECISION)
    return X


@triton.jit
def inverses(
    k,
    beta,
    g,
    scores,
    out,
    T: tl.constexpr,
    XH: tl.constexpr,
    H: tl.constexpr,
    GH: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    GK: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    MIXED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """(I + A)^-1 of one chunk: (B, H, N, C, C). scores: k k^T * D below the diagonal, of one decay
    a channel."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += (b * T * XH + h // (H // XH)) * K
    g += (b * T * GH + h * (GH // H)) * GK
    at = bh * tl.cdiv(T, C) + n
    if GK > 1:
        A = load_tile(scores + at * C * C, C, 0, C, 0, C, C, C)
    else:
        A = tl.full((C, C), 0.0, tl.float64 if EXACT else tl.float32)
        for k0 in range(0, K, BK):
            k_CK = load_tile(k, XH * K, n * C, T, k0, K, C, BK)
            A += dot(k_CK, tl.trans(k_CK), MIXED)
        A *= pair_decay(g, GH * GK, n * C, T, C, True)
    A *= load_tile(beta + b * T * H + h, H, n * C, T, 0, 1, C, 1)
    X = _inverse(A, C, LEVELS, SUMS)
    if EXACT:
        high = X.to(tl.float32).to(tl.float64)
        store_tile(out + at * 2 * C * C, C, 0, C, 0, C, high, C, C)
        store_tile(out + (at * 2 + 1) * C * C, C, 0, C, 0, C, X - high, C, C)
    else:
        store_tile(out + at * C * C, C, 0, C, 0, C, X, C, C)


@triton.jit
def _load_inverse(X, at, C: tl.constexpr, EXACT: tl.constexpr):
    """What `inverses` stored; EXACT: in float64, from its two float32 terms."""
    if EXACT:
        X += at * 2 * C * C
        X_CC = load_tile(X, C, 0, C, 0, C, C, C).to(tl.float64)
        X_CC += load_tile(X + C * C, C, 0, C, 0, C, C, C).to(tl.float64)
    else:
        X_CC = load_tile(X + at * C * C, C, 0, C, 0, C, C, C)
    return X_CC


@triton.jit
def writes(
    k,
    v,
    beta,
    g,
    X,
    start,
    u,
    out,
    final,
    T: tl.constexpr,
    XH: tl.constexpr,
    H: tl.constexpr,
    GH: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    GK: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    EXACT: tl.constexpr,
    MIXED: tl.constexpr,
):
    """U, the states that enter each chunk, and the last one. BK is all of K."""
    v0 = tl.program_id(0) * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    k += (b * T * XH + h // (H // XH)) * K
    v += (b * T * H + h) * V
    u += (b * T * H + h) * V
    beta += b * T * H + h
    g += (b * T * GH + h * (GH // H)) * GK
    S = load_tile(start + bh * K * V, V, 0, K, v0, V, BK, BV).to(
        tl.float64 if EXACT else tl.float32
    )
    for n in range(N):
        store_tile(out + (bh * N + n) * K * V, V, 0, K, v0, V, S, BK, BV)
        k_CK = load_tile(k, XH * K, n * C, T, 0, K, C, BK)
        through = tl.exp(load_g_cumsum(g, GH * GK, n * C, T, 0, GK, C, BG))
        after = tl.exp(load_g_reversed(g, GH * GK, n * C, T, 0, GK, C, BG))
        if GK > 1:
            found = dot(k_CK * through, S, MIXED)
        else:
            found = through * dot(k_CK, S, MIXED)
        v_CV = load_tile(v, H * V, n * C, T, v0, V, C, BV)
        R_CV = load_tile(beta, H, n * C, T, 0, 1, C, 1) * (v_CV - found)
        X_CC = _load_inverse(X, bh * N + n, C, EXACT)
        U_CV = dot(X_CC, R_CV, MIXED)
        store_tile(u, H * V, n * C, T, v0, V, U_CV, C, BV)
        S *= tl.exp(load_g_total(g, GH * GK, n * C, T, 0, GK, C, BG))
        if GK > 1:
            S += dot(tl.trans(k_CK * after), U_CV, MIXED)
        else:
            S += dot(tl.trans(k_CK), after * U_CV, MIXED)
    store_tile(final + bh * K * V, V, 0, K, v0, V, S, BK, BV)


@triton.jit
def gradients_of_writes(
    q,
    k,
    beta,
    g,
    X,
    do,
    du,
    dfinal,
    dr,
    out,
    dstart,
    T: tl.constexpr,
    XH: tl.constexpr,
    H: tl.constexpr,
    GH: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    GK: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    MIXED: tl.constexpr,
):
    """dR = (I + A)^-T dU, cotangents of the states that leave each chunk, and of the first. BK is
    all of K.

    du: what U has from the outputs of its own chunk.
    """
    v0 = tl.program_id(0) * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    q += (b * T * XH + h // (H // XH)) * K
    k += (b * T * XH + h // (H // XH)) * K
    beta += b * T * H + h
    g += (b * T * GH + h * (GH // H)) * GK
    at = (b * T * H + h) * V
    dS = load_tile(dfinal + bh * K * V, V, 0, K, v0, V, BK, BV).to(
        tl.float64 if EXACT else tl.float32
    )
    for step in range(N):
        n = N - 1 - step
        store_tile(out + (bh * N + n) * K * V, V, 0, K, v0, V, dS, BK, BV)
        k_CK = load_tile(k, XH * K, n * C, T, 0, K, C, BK)
        after = tl.exp(load_g_reversed(g, GH * GK, n * C, T, 0, GK, C, BG))
        dU_CV = load_tile(du + at, H * V, n * C, T, v0, V, C, BV)
        if GK > 1:
            dU_CV += dot(k_CK * after, dS, MIXED)
        else:
            dU_CV += after * dot(k_CK, dS, MIXED)
        X_CC = _load_inverse(X, bh * N + n, C, EXACT)
        dR_CV = dot(tl.trans(X_CC), dU_CV, MIXED)
        store_tile(dr + at, H * V, n * C, T, v0, V, dR_CV, C, BV)
        through = tl.exp(load_g_cumsum(g, GH * GK, n * C, T, 0, GK, C, BG))
        dS *= tl.exp(load_g_total(g, GH * GK, n * C, T, 0, GK, C, BG))
        q_CK = load_tile(q, XH * K, n * C, T, 0, K, C, BK)
        do_CV = load_tile(do + at, H * V, n * C, T, v0, V, C, BV)
        dR_CV *= load_tile(beta, H, n * C, T, 0, 1, C, 1)
        if GK > 1:
            dS += SCALE * dot(tl.trans(q_CK * through), do_CV, MIXED)
            dS -= dot(tl.trans(k_CK * through), dR_CV, MIXED)
        else:
            dS += SCALE * dot(tl.trans(q_CK), through * do_CV, MIXED)
            dS -= dot(tl.trans(k_CK), through * dR_CV, MIXED)
    store_tile(dstart + bh * K * V, V, 0, K, v0, V, dS, BK, BV)
