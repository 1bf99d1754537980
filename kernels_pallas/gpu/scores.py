"""Triton kernels of decayed scores with a decay per key channel, by sub-chunks, and their
gradients.

    A_ij = sum_K x_iK y_jK exp(g_{j+1} + ... + g_i)_K          j <= i (STRICT: j < i)

A chunk is cut into sub-chunks of SUB tokens. For i in sub-chunk a and j in an earlier one b, the
exponent is g_reversed_j of b, plus whole sub-chunks between, plus g_cumsum_i of a: all
non-positive, so each side takes its own exponential, at most 1, and the pair of sub-chunks is one
matrix product ("secondary chunking", GLA, arXiv 2312.06635, section 4.3). Inside a sub-chunk the
columns are walked backwards, and each step adds the decay of one token.
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
    store_tile,
)


@triton.jit
def decayed_scores(
    x, y, g, out,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, STRICT: tl.constexpr, SUB: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes the rows of A (B, H, N, C, C) for one sub-chunk of SUB tokens. A_ij =
    sum_K x_iK y_jK exp(g_{j+1} + ... + g_i)_K for j <= i (STRICT: j < i), else 0."""
    a = tl.program_id(0) % (C // SUB)
    n = tl.program_id(0) // (C // SUB)
    bh, key, value, gate = head(T, XH, H, GH)
    x += key * K
    y += key * K
    g += value * K
    out += (bh * tl.cdiv(T, C) + n) * C * C
    t0 = n * C + a * SUB
    i = tl.arange(0, SUB)[:, None]
    j = tl.arange(0, SUB)[None, :]
    # Columns right of this sub-chunk: zeros.
    zeros = tl.full((SUB, SUB), 0.0, tl.float32)
    for other in range(a + 1, C // SUB):
        store_tile(out, C, a * SUB, C, other * SUB, C, zeros, SUB, SUB)
    # This sub-chunk, column by column: `between` is the sum of g after the column, through i.
    diagonal = zeros
    for k0 in range(0, K, BK):
        x_SK = load_tile(x, XH * K, t0, T, k0, K, SUB, BK).to(tl.float32)
        between = tl.full((SUB, BK), 0.0, tl.float32)
        for step in range(SUB):
            column = SUB - 1 - step
            seen = i > column if STRICT else i >= column
            y_1K = load_tile(y, XH * K, t0 + column, T, k0, K, 1, BK).to(tl.float32)
            g_1K = load_tile(g, H * K, t0 + column, T, k0, K, 1, BK)
            pairs = tl.where(seen, x_SK * y_1K * tl.exp(between), 0.0)
            diagonal += tl.where(j == column, tl.sum(pairs, axis=1)[:, None], 0.0)
            between += tl.where(i >= column, g_1K, 0.0)
    store_tile(out, C, a * SUB, C, a * SUB, C, diagonal, SUB, SUB)
    # Earlier ones, the nearest first: (x exp(g_cumsum)) (y exp(g_reversed + gap))^T.
    for step in range(a):
        other = a - 1 - step
        first = n * C + other * SUB
        block = zeros
        for k0 in range(0, K, BK):
            g_cumsum = load_g_cumsum(g, H * K, t0, T, k0, K, SUB, BK)
            g_reversed = load_g_reversed(g, H * K, first, T, k0, K, SUB, BK)
            # Whole sub-chunks between the two.
            end = tl.minimum(T, t0)
            gap = tl.trans(load_g_total(g, H * K, first + SUB, end, k0, K, C, BK))
            x_SK = load_tile(x, XH * K, t0, T, k0, K, SUB, BK) * tl.exp(g_cumsum)
            y_SK = load_tile(y, XH * K, first, T, k0, K, SUB, BK) * tl.exp(g_reversed + gap)
            block += dot(x_SK, tl.trans(y_SK), MIXED)
        store_tile(out, C, a * SUB, C, other * SUB, C, block, SUB, SUB)


@triton.jit
def gradients_of_scores(
    do, y, out,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, STRICT: tl.constexpr, SCALE: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dA = scale do y^T of one chunk, for o = scale A y. It is 0 above the
    diagonal, and with STRICT on it."""
    n = tl.program_id(0)
    bh, key, value, gate = head(T, XH, H, GH)
    do += value * V
    y += value * V
    dA = tl.full((C, C), 0.0, tl.float32)
    for v0 in range(0, V, BV):
        do_CV = load_tile(do, H * V, n * C, T, v0, V, C, BV)
        y_CV = load_tile(y, H * V, n * C, T, v0, V, C, BV)
        dA += dot(do_CV, tl.trans(y_CV), INPUTS)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if STRICT:
        dA = tl.where(i > j, SCALE * dA, 0.0)
    else:
        dA = tl.where(i >= j, SCALE * dA, 0.0)
    store_tile(out + (bh * tl.cdiv(T, C) + n) * C * C, C, 0, C, 0, C, dA, C, C)


@triton.jit
def gradients_of_operands(
    x, y, g, dA, dx_in, dy_in, dg_in, dx, dy, dg,
    T: tl.constexpr, XH: tl.constexpr, H: tl.constexpr, GH: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GK: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, STRICT: tl.constexpr, SUB: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dx, dy and dg of `decayed_scores` from dA, for one sub-chunk c.

    A program takes one block of K. dx_in, dy_in, dg_in: gradients through the states, to which
    these are added. dg_s collects the term of every pair j < s <= i: those with both in c; i in c
    and j before it; j in c and i after it; and j before c with i after it.
    """
    blocks = tl.cdiv(K, BK)
    k0 = tl.program_id(0) % blocks * BK
    c = tl.program_id(0) // blocks % (C // SUB)
    n = tl.program_id(0) // blocks // (C // SUB)
    bh, key, value, gate = head(T, XH, H, GH)
    x += key * K
    y += key * K
    at = value * K
    g += at
    dA += (bh * tl.cdiv(T, C) + n) * C * C
    first = n * C
    t0 = first + c * SUB
    i = tl.arange(0, SUB)[:, None]
    g_cumsum = load_g_cumsum(g, H * K, t0, T, k0, K, SUB, BK)
    g_reversed = load_g_reversed(g, H * K, t0, T, k0, K, SUB, BK)
    g_total = tl.trans(load_g_total(g, H * K, t0, T, k0, K, SUB, BK))
    x_SK = load_tile(x, XH * K, t0, T, k0, K, SUB, BK).to(tl.float32)
    y_SK = load_tile(y, XH * K, t0, T, k0, K, SUB, BK).to(tl.float32)
    dx_SK = tl.full((SUB, BK), 0.0, tl.float32)
    dy_SK = tl.full((SUB, BK), 0.0, tl.float32)
    dg_SK = tl.full((SUB, BK), 0.0, tl.float32)
    # dx from earlier sub-chunks j: dA (y exp(g_reversed + gap)), then times exp(g_cumsum).
    gap = tl.full((1, BK), 0.0, tl.float32)
    for step in range(c):
        other = c - 1 - step
        t1 = first + other * SUB
        decay = load_g_reversed(g, H * K, t1, T, k0, K, SUB, BK) + gap
        y_other = load_tile(y, XH * K, t1, T, k0, K, SUB, BK) * tl.exp(decay)
        dA_SS = load_tile(dA, C, c * SUB, C, other * SUB, C, SUB, SUB)
        dx_SK += dot(dA_SS, y_other, MIXED)
        # dg of pairs on either side of c, all of which cross each of its tokens.
        gap_right = tl.full((1, BK), 0.0, tl.float32)
        for right in range(c + 1, C // SUB):
            t2 = first + right * SUB
            decay = load_g_cumsum(g, H * K, t2, T, k0, K, SUB, BK) + gap_right
            x_right = load_tile(x, XH * K, t2, T, k0, K, SUB, BK) * tl.exp(decay)
            dA_SS = load_tile(dA, C, right * SUB, C, other * SUB, C, SUB, SUB)
            around = tl.sum(x_right * dot(dA_SS, y_other, MIXED), axis=0)[None, :]
            dg_SK += tl.exp(g_total) * around
            gap_right += tl.trans(load_g_total(g, H * K, t2, T, k0, K, SUB, BK))
        gap += tl.trans(load_g_total(g, H * K, t1, T, k0, K, SUB, BK))
    dx_SK *= tl.exp(g_cumsum)
    # dy from later sub-chunks i: dA^T (x exp(g_cumsum + gap)), then times exp(g_reversed).
    gap = tl.full((1, BK), 0.0, tl.float32)
    for right in range(c + 1, C // SUB):
        t2 = first + right * SUB
        decay = load_g_cumsum(g, H * K, t2, T, k0, K, SUB, BK) + gap
        x_right = load_tile(x, XH * K, t2, T, k0, K, SUB, BK) * tl.exp(decay)
        dA_SS = load_tile(dA, C, right * SUB, C, c * SUB, C, SUB, SUB)
        dy_SK += dot(tl.trans(dA_SS), x_right, MIXED)
        gap += tl.trans(load_g_total(g, H * K, t2, T, k0, K, SUB, BK))
    dy_SK *= tl.exp(g_reversed)
    # dg of pairs with i in c and j before it; those with j in c and i after it are added below.
    dg_SK += tl.cumsum(x_SK * dx_SK, axis=0, reverse=True)
    dg_reversed = y_SK * dy_SK
    # Pairs inside c, column by column, as in `decayed_scores`.
    between = tl.full((SUB, BK), 0.0, tl.float32)
    for step in range(SUB):
        column = SUB - 1 - step
        seen = i > column if STRICT else i >= column
        y_1K = load_tile(y, XH * K, t0 + column, T, k0, K, 1, BK).to(tl.float32)
        g_1K = load_tile(g, H * K, t0 + column, T, k0, K, 1, BK)
        dA_S1 = load_tile(dA, C, c * SUB, C, c * SUB + column, C, SUB, 1)
        weight = tl.where(seen, dA_S1 * tl.exp(between), 0.0)
        dx_SK += weight * y_1K
        dy_1K = tl.sum(weight * x_SK, axis=0)[None, :]
        dy_SK += tl.where(i == column, dy_1K, 0.0)
        dg_1K = tl.sum(tl.where(i == column, dg_reversed, 0.0), axis=0)[None, :]
        pairs = tl.where(i > column, weight * x_SK * y_1K, 0.0)
        crossing = tl.cumsum(pairs, axis=0, reverse=True) + dg_1K
        dg_SK += tl.where(i > column, crossing, 0.0)
        between += tl.where(i >= column, g_1K, 0.0)
    dx_SK += load_tile(dx_in + at, H * K, t0, T, k0, K, SUB, BK)
    dy_SK += load_tile(dy_in + at, H * K, t0, T, k0, K, SUB, BK)
    dg_SK += load_tile(dg_in + at, H * K, t0, T, k0, K, SUB, BK)
    store_tile(dx + at, H * K, t0, T, k0, K, dx_SK, SUB, BK)
    store_tile(dy + at, H * K, t0, T, k0, K, dy_SK, SUB, BK)
    store_tile(dg + at, H * K, t0, T, k0, K, dg_SK, SUB, BK)
