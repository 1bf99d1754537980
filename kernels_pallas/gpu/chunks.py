"""Triton kernels of the matrix recurrences, chunk by chunk, for any decay: states, outputs and
their gradients.

The equations are those of docs/math/linear_attention.md, for any k and y (linear attention: y = v;
the delta rule: y = U):

    states    S' = exp(g_total) S + (k exp(g_reversed))^T y      chunks in turn, blocks of S at once
    outputs   o = scale ((q exp(g_cumsum)) S + A y)              chunks at once
    A         (q k^T) * D with a decay per token; loaded (`scores.py`) with one per channel

and the gradients of both, recomputed from inputs and the states at chunk boundaries. A grid's
second axis is (batch, head); its first holds chunks and blocks of K or V. q and k have XH heads,
which divide H; g has GH heads (1 or H) of GK channels (1 or K).
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
def states(
    x, y, g, start, out, final,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, REVERSE: tl.constexpr, SCALE: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes the states that enter the chunks (out), and the final state.

    REVERSE, with x = q and y = do: the cotangents of the states that leave the chunks, and that of
    the initial state. A program walks all chunks for one (BK, BV) block of one head's state.
    """
    blocks = tl.cdiv(V, BV)
    k0 = tl.program_id(0) // blocks * BK
    v0 = tl.program_id(0) % blocks * BV
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    x += key * K
    y += value * V
    g += gate * GK
    g0 = k0 if GK > 1 else 0
    S = load_tile(start + bh * K * V, V, k0, K, v0, V, BK, BV).to(tl.float32)
    for step in range(N):
        n = step
        if REVERSE:
            n = N - 1 - step
        store_tile(out + (bh * N + n) * K * V, V, k0, K, v0, V, S, BK, BV)
        if REVERSE:
            g_sum = load_g_cumsum(g, GH * GK, n * C, T, g0, GK, C, BG)
        else:
            g_sum = load_g_reversed(g, GH * GK, n * C, T, g0, GK, C, BG)
        g_total = load_g_total(g, GH * GK, n * C, T, g0, GK, C, BG)
        # S' = exp(g_total) S + (x exp(g_reversed))^T y, in reverse with exp(g_cumsum)
        x_CK = load_tile(x, XH * K, n * C, T, k0, K, C, BK) * tl.exp(g_sum)
        y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
        S = S * tl.exp(g_total) + SCALE * dot(tl.trans(x_CK), y_CV, MIXED)
    store_tile(final + bh * K * V, V, k0, K, v0, V, S, BK, BV)


@triton.jit
def outputs(
    q, k, y, g, S, scores, o,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, STRICT: tl.constexpr, SCALE: tl.constexpr, INPUTS: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes o = scale ((q exp(g_cumsum)) S + A y) of one chunk and block of V.

    S: the states that enter the chunks. A: (q k^T) * D, with a decay per channel loaded from
      `scores`.
    STRICT: A_ii = 0.
    """
    blocks = tl.cdiv(V, BV)
    n = tl.program_id(0) // blocks
    v0 = tl.program_id(0) % blocks * BV
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    q += key * K
    k += key * K
    y += value * V
    g += gate * GK
    o += value * V
    S += (bh * N + n) * K * V
    acc = tl.full((C, BV), 0.0, tl.float32)
    A = tl.full((C, C), 0.0, tl.float32)
    # (q exp(g_cumsum)) S, and q k^T where the decay is per token
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
    # o = scale ((q exp(g_cumsum)) S + A y)
    y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
    acc = SCALE * (acc + dot(A, y_CV, MIXED))
    store_tile(o, H * V, n * C, T, v0, V, acc, C, BV)


@triton.jit
def gradients_of_values(
    q, k, g, do, dS, scores, dy,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, LEAVING: tl.constexpr, SCALE: tl.constexpr, INPUTS: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dy of `outputs` and `states` for one chunk and block of V.

    dy = scale A^T do + (k exp(g_reversed)) dS'. scores: A, if decay is per channel. dS: the
    cotangents dS' of the states that leave the chunks; without LEAVING their term is left out.
    """
    blocks = tl.cdiv(V, BV)
    n = tl.program_id(0) // blocks
    v0 = tl.program_id(0) % blocks * BV
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    q += key * K
    k += key * K
    g += gate * GK
    do += value * V
    dy += value * V
    acc = tl.full((C, BV), 0.0, tl.float32)
    A = tl.full((C, C), 0.0, tl.float32)
    # (k exp(g_reversed)) dS', and q k^T where the decay is per token
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
    # dy = scale A^T do + (k exp(g_reversed)) dS'
    do_CV = load_tile(do, H * V, n * C, T, v0, V, C, BV)
    acc += SCALE * dot(tl.trans(A), do_CV, MIXED)
    store_tile(dy, H * V, n * C, T, v0, V, acc, C, BV)


@triton.jit
def gradients_of_keys(
    q, k, y, g, do, S, dS, dq, dk, dg,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, STRICT: tl.constexpr, LEAVING: tl.constexpr, SCALE: tl.constexpr,
    INPUTS: tl.constexpr, MIXED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dq, dk and dg of one chunk and one block of K, per value head.

    S, dS: states that enter the chunks, and cotangents of those that leave them (read if LEAVING).
      With a decay per channel, the gradients are only those through the states;
      `scores.gradients_of_operands` adds those between tokens of a chunk. With a decay per token
      they are complete, and dg (B, blocks of K, T, H) is to be summed over blocks.
    dg_s sums what crosses token s: from the entering state, between tokens, to the leaving state
    (docs/math, "Gradient of each token's log decay").
    """
    blocks = tl.cdiv(K, BK)
    n = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    k0 = block * BK
    bh, key, value, gate = head(T, XH, H, GH)
    N = tl.cdiv(T, C)
    q += key * K
    k += key * K
    g += gate * GK
    y += value * V
    do += value * V
    dq += value * K
    dk += value * K
    dq_CK = tl.full((C, BK), 0.0, tl.float32)
    dk_CK = tl.full((C, BK), 0.0, tl.float32)
    dA = tl.full((C, C), 0.0, tl.float32)
    dtotal = tl.full((BK,), 0.0, tl.float32)
    # do S^T, y dS'^T, sum_V S * dS', and dA = do y^T where the decay is per token
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
    # Parts of dq and dk that pass through a state, and their products with q and k.
    dq_CK *= SCALE * tl.exp(load_g_cumsum(g, GH * GK, n * C, T, g0, GK, C, BG))
    dk_CK *= tl.exp(load_g_reversed(g, GH * GK, n * C, T, g0, GK, C, BG))
    dg_cumsum = q_CK.to(tl.float32) * dq_CK
    dg_reversed = k_CK.to(tl.float32) * dk_CK
    g_total = load_g_total(g, GH * GK, n * C, T, g0, GK, C, BG)
    dg_total = tl.exp(g_total) * dtotal[:, None]
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if GK > 1:
        # dg_s: g_cumsum_i of i >= s, g_reversed_j of j < s, and g_total.
        dg_CK = tl.cumsum(dg_cumsum, axis=0, reverse=True) + tl.sum(dg_total, axis=1)[None, :]
        dg_CK += dot((i > j).to(tl.float32), dg_reversed, SUMS)
        store_tile(dg + value * K, H * K, n * C, T, k0, K, dg_CK, C, BK)
    else:
        # dA * D, and the pairs dD * D, which cross s where j < s <= i; then as above.
        dA *= SCALE * pair_decay(g, GH * GK, n * C, T, C, STRICT)
        pairs = tl.where(i > j, dA * dot(q_CK, tl.trans(k_CK), INPUTS), 0.0)
        dg_reversed_C = tl.trans(tl.sum(dg_reversed, axis=1)[:, None])
        crossing = tl.where(i > j, tl.cumsum(pairs, axis=0, reverse=True) + dg_reversed_C, 0.0)
        dg_C = tl.cumsum(tl.sum(dg_cumsum, axis=1), axis=0, reverse=True) + tl.sum(crossing, axis=1)
        dg_C1 = (dg_C + tl.sum(tl.sum(dg_total, axis=1), axis=0))[:, None]
        b, h = bh // H, bh % H
        dg += (b * blocks + block) * T * H + h
        store_tile(dg, H, n * C, T, 0, 1, dg_C1, C, 1)
        # dq = (dA * D) k + ..., dk = (dA * D)^T q + ...
        dq_CK += dot(dA, k_CK, MIXED)
        dk_CK += dot(tl.trans(dA), q_CK, MIXED)
    store_tile(dq, H * K, n * C, T, k0, K, dq_CK, C, BK)
    store_tile(dk, H * K, n * C, T, k0, K, dk_CK, C, BK)
