"""Triton kernels of the matrix recurrences, chunk by chunk, for any decay: states, outputs and
their gradients.

With x, y standing for whatever is multiplied (linear attention: k and v; the delta rule: k and what
its tokens write):

    states      S_next = diag(exp total) S + (x exp(after))^T y        sequential in chunks,
      parallel in blocks of S
    outputs     o = scale ((q exp(through)) S + A y)                   parallel in chunks
    A           the decayed scores (q k^T) * D of one decay a head, or loaded (`triton_scores`) of
      one a channel

and the gradients of both, recomputed from inputs and the states at chunk boundaries. The chunkwise
form is that of GLA (arXiv 2312.06635, section 4) and Mamba-2's SSD (2405.21060, section 6). A
grid's second axis is (batch, head); its first holds chunks and blocks of K or V. q and k have XH
heads, which divide H; g has GH heads (1 or H) of GK channels (1 or K).
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
def states(
    x,
    y,
    g,
    start,
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
    REVERSE: tl.constexpr,
    SCALE: tl.constexpr,
    MIXED: tl.constexpr,
):
    """States that enter each chunk, and the last; REVERSE: cotangents of those that leave each, and
    of the first."""
    blocks = tl.cdiv(V, BV)
    k0 = tl.program_id(0) // blocks * BK
    v0 = tl.program_id(0) % blocks * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    x += (b * T * XH + h // (H // XH)) * K
    y += (b * T * H + h) * V
    g += (b * T * GH + h * (GH // H)) * GK
    g0 = k0 if GK > 1 else 0
    S = load_tile(start + bh * K * V, V, k0, K, v0, V, BK, BV).to(tl.float32)
    for step in range(N):
        n = step
        if REVERSE:
            n = N - 1 - step
        store_tile(out + (bh * N + n) * K * V, V, k0, K, v0, V, S, BK, BV)
        if REVERSE:
            decay = load_g_cumsum(g, GH * GK, n * C, T, g0, GK, C, BG)
        else:
            decay = load_g_reversed(g, GH * GK, n * C, T, g0, GK, C, BG)
        total = load_g_total(g, GH * GK, n * C, T, g0, GK, C, BG)
        x_CK = load_tile(x, XH * K, n * C, T, k0, K, C, BK) * tl.exp(decay)
        y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
        S = S * tl.exp(total) + SCALE * dot(tl.trans(x_CK), y_CV, MIXED)
    store_tile(final + bh * K * V, V, k0, K, v0, V, S, BK, BV)


@triton.jit
def outputs(
    q,
    k,
    y,
    g,
    S,
    scores,
    o,
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
    STRICT: tl.constexpr,
    SCALE: tl.constexpr,
    INPUTS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """o of one chunk and block of V. STRICT: token i does not see its own y."""
    blocks = tl.cdiv(V, BV)
    n = tl.program_id(0) // blocks
    v0 = tl.program_id(0) % blocks * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    q += (b * T * XH + h // (H // XH)) * K
    k += (b * T * XH + h // (H // XH)) * K
    y += (b * T * H + h) * V
    g += (b * T * GH + h * (GH // H)) * GK
    o += (b * T * H + h) * V
    S += (bh * N + n) * K * V
    acc = tl.full((C, BV), 0.0, tl.float32)
    A = tl.full((C, C), 0.0, tl.float32)
    for k0 in range(0, K, BK):
        q_CK = load_tile(q, XH * K, n * C, T, k0, K, C, BK)
        S_KV = load_tile(S, V, k0, K, v0, V, BK, BV)
        if GK > 1:
            q_CK = q_CK * tl.exp(load_g_cumsum(g, GH * GK, n * C, T, k0, GK, C, BG))
        else:
            k_CK = load_tile(k, XH * K, n * C, T, k0, K, C, BK)
            A += dot(q_CK, tl.trans(k_CK), INPUTS)
        acc += dot(q_CK, S_KV, MIXED)
    if GK > 1:
        A = load_tile(scores + (bh * N + n) * C * C, C, 0, C, 0, C, C, C)
    else:
        acc *= tl.exp(load_g_cumsum(g, GH * GK, n * C, T, 0, 1, C, 1))
        A *= pair_decay(g, GH * GK, n * C, T, C, STRICT)
    y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
    acc = SCALE * (acc + dot(A, y_CV, MIXED))
    store_tile(o, H * V, n * C, T, v0, V, acc, C, BV)


@triton.jit
def gradients_of_values(
    q,
    k,
    g,
    do,
    dS,
    scores,
    dy,
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
    LEAVING: tl.constexpr,
    SCALE: tl.constexpr,
    INPUTS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """dy of one chunk and block of V: scale A^T do, and, LEAVING, (k exp(after)) dS of the state
    that leaves."""
    blocks = tl.cdiv(V, BV)
    n = tl.program_id(0) // blocks
    v0 = tl.program_id(0) % blocks * BV
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    q += (b * T * XH + h // (H // XH)) * K
    k += (b * T * XH + h // (H // XH)) * K
    g += (b * T * GH + h * (GH // H)) * GK
    do += (b * T * H + h) * V
    dy += (b * T * H + h) * V
    acc = tl.full((C, BV), 0.0, tl.float32)
    A = tl.full((C, C), 0.0, tl.float32)
    if LEAVING or GK == 1:
        for k0 in range(0, K, BK):
            k_CK = load_tile(k, XH * K, n * C, T, k0, K, C, BK)
            if GK == 1:
                q_CK = load_tile(q, XH * K, n * C, T, k0, K, C, BK)
                A += dot(q_CK, tl.trans(k_CK), INPUTS)
            if LEAVING:
                if GK > 1:
                    k_CK = k_CK * tl.exp(load_g_reversed(g, GH * GK, n * C, T, k0, GK, C, BG))
                dS_KV = load_tile(dS + (bh * N + n) * K * V, V, k0, K, v0, V, BK, BV)
                acc += dot(k_CK, dS_KV, MIXED)
    if GK > 1:
        A = load_tile(scores + (bh * N + n) * C * C, C, 0, C, 0, C, C, C)
    else:
        A *= pair_decay(g, GH * GK, n * C, T, C, False)
        acc *= tl.exp(load_g_reversed(g, GH * GK, n * C, T, 0, 1, C, 1))
    do_CV = load_tile(do, H * V, n * C, T, v0, V, C, BV)
    acc += SCALE * dot(tl.trans(A), do_CV, MIXED)
    store_tile(dy, H * V, n * C, T, v0, V, acc, C, BV)


@triton.jit
def gradients_of_keys(
    q,
    k,
    y,
    g,
    do,
    S,
    dS,
    dq,
    dk,
    dg,
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
    STRICT: tl.constexpr,
    LEAVING: tl.constexpr,
    SCALE: tl.constexpr,
    INPUTS: tl.constexpr,
    MIXED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """dq, dk and dg of one chunk and block of K, for every value head.

    One decay a head: all of them; dg (B, blocks of K, T, H) is still to be summed over the blocks.
    One a channel: what comes through the states; the pairs of a chunk are added by
    `triton_scores.gradients`. dg_t is a sum of like terms: what passed through t from the entering
    state, from tokens before it, and to the leaving state.
    """
    blocks = tl.cdiv(K, BK)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    k0 = block * BK
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    N = tl.cdiv(T, C)
    q += (b * T * XH + h // (H // XH)) * K
    k += (b * T * XH + h // (H // XH)) * K
    g += (b * T * GH + h * (GH // H)) * GK
    y += (b * T * H + h) * V
    do += (b * T * H + h) * V
    dq += (b * T * H + h) * K
    dk += (b * T * H + h) * K
    dq_CK = tl.full((C, BK), 0.0, tl.float32)
    dk_CK = tl.full((C, BK), 0.0, tl.float32)
    dA = tl.full((C, C), 0.0, tl.float32)
    dtotal = tl.full((BK,), 0.0, tl.float32)
    for v0 in range(0, V, BV):
        do_CV = load_tile(do, H * V, n * C, T, v0, V, C, BV)
        S_KV = load_tile(S + (bh * N + n) * K * V, V, k0, K, v0, V, BK, BV)
        dq_CK += dot(do_CV, tl.trans(S_KV), MIXED)
        y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
        if LEAVING:
            dS_KV = load_tile(dS + (bh * N + n) * K * V, V, k0, K, v0, V, BK, BV)
            dk_CK += dot(y_CV, tl.trans(dS_KV), MIXED)
            dtotal += tl.sum(S_KV.to(tl.float32) * dS_KV.to(tl.float32), axis=1)
        if GK == 1:
            dA += dot(do_CV, tl.trans(y_CV), INPUTS)
    g0 = k0 if GK > 1 else 0
    q_CK = load_tile(q, XH * K, n * C, T, k0, K, C, BK)
    k_CK = load_tile(k, XH * K, n * C, T, k0, K, C, BK)
    dq_CK *= SCALE * tl.exp(load_g_cumsum(g, GH * GK, n * C, T, g0, GK, C, BG))
    dk_CK *= tl.exp(load_g_reversed(g, GH * GK, n * C, T, g0, GK, C, BG))
    entered = q_CK.to(tl.float32) * dq_CK
    left = k_CK.to(tl.float32) * dk_CK
    total = load_g_total(g, GH * GK, n * C, T, g0, GK, C, BG)
    kept = tl.exp(total) * dtotal[:, None]
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if GK > 1:
        dg_CK = tl.cumsum(entered, axis=0, reverse=True) + tl.sum(kept, axis=1)[None, :]
        dg_CK += dot((i > j).to(tl.float32), left, SUMS)
        store_tile(dg + (b * T * H + h) * K, H * K, n * C, T, k0, K, dg_CK, C, BK)
    else:
        dA *= SCALE * pair_decay(g, GH * GK, n * C, T, C, STRICT)
        pairs = tl.where(i > j, dA * dot(q_CK, tl.trans(k_CK), INPUTS), 0.0)
        left_C = tl.trans(tl.sum(left, axis=1)[:, None])
        passed = tl.where(i > j, tl.cumsum(pairs, axis=0, reverse=True) + left_C, 0.0)
        dg_C = tl.cumsum(tl.sum(entered, axis=1), axis=0, reverse=True) + tl.sum(passed, axis=1)
        dg_C1 = (dg_C + tl.sum(tl.sum(kept, axis=1), axis=0))[:, None]
        dg += (b * blocks + block) * T * H + h
        store_tile(dg, H, n * C, T, 0, 1, dg_C1, C, 1)
        dq_CK += dot(dA, k_CK, MIXED)
        dk_CK += dot(tl.trans(dA), q_CK, MIXED)
    store_tile(dq, H * K, n * C, T, k0, K, dq_CK, C, BK)
    store_tile(dk, H * K, n * C, T, k0, K, dk_CK, C, BK)
