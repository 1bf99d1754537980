"""One chunk of linear attention inside a TPU kernel, with a decay per key channel.

A chunk is halved again and again (docs/math/linear_attention.md, "Per channel"): tokens j < i part
at one level, j into a left half of U tokens and i into the right half beside it, and there

    D_ij = exp(g_cumsum_i) * exp(g_reversed_j),

the decay from the middle through i times that after j to the middle. Here both are products of
decays in [0, 1], each level's from the level below by one multiplication: a right half's
exp(g_cumsum) takes the whole decay of the left half, a left half's exp(g_reversed) that of the
right. No exponent is ever added up or subtracted; a reset is a factor 0.

Each level is one product (q exp(g_cumsum)) (k exp(g_reversed))^T, of which the pairs that part
there are kept; at the top both decay what enters and what leaves. The state is stored as (V, K):
its decay lies along the lanes.

Backward, each level has the cotangents p_i of g_cumsum_i and e_j of g_reversed_j, and the gradient
of g is their sum back through the same tree, top down: sums of like terms.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.ops.linear_attention.tpu.per_token import ChunkGradients
from kernels_pallas.tpu.primitives import SUBLANES, iota

SELF, NEVER_MEET = -1, -2  # "levels" of the pairs i = j and i < j


def constants(tiling, backward):
    """Returns (C, C) int32: floor(log2(i ^ j)) for i > j, SELF for i = j, NEVER_MEET for i < j."""
    del backward
    i, j = np.arange(tiling.C)[:, None], np.arange(tiling.C)[None]
    level = np.frexp((i ^ j).astype(np.float64))[1] - 1
    return (jnp.asarray(np.where(i < j, NEVER_MEET, level), jnp.int32),)


def _tree(g_CK):
    """Yields (exp(g_cumsum), exp(g_reversed)) within blocks of 1, 2, 4, ..., C tokens."""
    C = g_CK.shape[0]
    exp_g_cumsum, exp_g_reversed = jnp.exp(g_CK), jnp.ones_like(g_CK)
    U = 1
    yield exp_g_cumsum, exp_g_reversed
    while U < C:
        step = _small_step if U < SUBLANES else _large_step
        exp_g_cumsum, exp_g_reversed = step(exp_g_cumsum, exp_g_reversed, U)
        yield exp_g_cumsum, exp_g_reversed
        U *= 2


def _small_step(cumsum_CK, reversed_CK, U):
    """Combines the decays of halves of U <= 4 rows to those of blocks of 2 U rows. Returns
    exp(g_cumsum) and exp(g_reversed) (C, K) of the blocks, which lie inside a register's 8 rows."""
    C, K = cumsum_CK.shape
    cumsum, reversed_ = (x.reshape(C // SUBLANES, SUBLANES, K) for x in (cumsum_CK, reversed_CK))
    row = iota(cumsum.shape, 1)
    right = row & U > 0
    # The last row of each half is that half's whole decay: seen from the half beside it.
    if U == 1:
        beside = _swapped(cumsum, 1, row)
    elif U == 2:
        lower, upper = (_swapped_last(cumsum, first, row & 2 > 0) for first in (0, 4))
        beside = jnp.where(row < 4, lower, upper)
    else:
        beside = _swapped_last(cumsum, 0, right, 4)
    cumsum = jnp.where(right, cumsum * beside, cumsum)
    reversed_ = jnp.where(right, reversed_, reversed_ * beside)
    return cumsum.reshape(C, K), reversed_.reshape(C, K)


def _swapped_last(x, first, right, U=2):
    """Gives each row the other half's last row, in the block of 2 U rows from `first` on."""
    left_last = x[:, first + U - 1 : first + U]
    right_last = x[:, first + 2 * U - 1 : first + 2 * U]
    return jnp.where(right, left_last, right_last)


def _swapped(x, U, row):
    """Swaps neighbouring halves of U rows (1, 2 or 4) inside registers of 8 rows."""
    up, down = _roll(x, SUBLANES - U), _roll(x, U)
    return down if U == 4 else jnp.where(row & U > 0, down, up)


def _roll(x, by):
    """Moves the rows of each register of 8 rows down by `by`, cyclically."""
    return jnp.roll(x, by, axis=1)


def _large_step(cumsum_CK, reversed_CK, U):
    """Combines the decays of halves of U rows, whole registers, to those of blocks of 2 U rows.
    Returns exp(g_cumsum) and exp(g_reversed) (C, K) of the blocks."""
    left, right = _halves(cumsum_CK, U)
    reversed_left, reversed_right = _halves(reversed_CK, U)
    cumsum_CK = _joined(left, right * left[:, U - 1 :])
    return cumsum_CK, _joined(reversed_left * right[:, U - 1 :], reversed_right)


def _halves(x_CK, U):
    """Splits rows (C, K) into left and right halves of blocks of 2 U rows, (M, U, K) each."""
    C, K = x_CK.shape
    x = x_CK.reshape(C // (2 * U), 2, U, K)
    return x[:, 0], x[:, 1]


def _joined(left_MUK, right_MUK):
    M, U, K = left_MUK.shape
    return jnp.stack([left_MUK, right_MUK], axis=1).reshape(2 * M * U, K)


def _right(x_CK, U):
    """Returns the rows of x in right halves of U rows, (C/2, K). All rows if U is less than a
    register's 8 rows."""
    if U < SUBLANES:
        return x_CK
    _, right_MUK = _halves(x_CK, U)
    return right_MUK.reshape(-1, x_CK.shape[1])


def _from_right(x, U):
    """Puts the rows that `_right` took back in their places, with zeros in left halves."""
    if U < SUBLANES:
        return x
    x_MUK = x.reshape(-1, U, x.shape[1])
    return _joined(jnp.zeros_like(x_MUK), x_MUK)


def _scores(tiling, level_CC, qk_CC, levels):
    """Computes A_ij = scale sum_K q_i D_ij k_j (C, C) for j <= i, else 0. levels: (scale q, k),
    decayed to the middle of blocks of 2, 4, ..., C tokens; qk_CC: q k^T, for i = j."""
    A_CC = jnp.where(level_CC == SELF, qk_CC * tiling.scale, 0.0)
    for n, (q_CK, k_CK) in enumerate(levels):
        U = 1 << n
        rows = tiling.products.rounded(_right(q_CK, U), k_CK, (1, 1))
        if U < SUBLANES:
            A_CC = jnp.where(level_CC == n, rows, A_CC)
            continue
        left, right = _halves(A_CC, U)
        mask = _halves(level_CC, U)[1] == n
        A_CC = _joined(left, jnp.where(mask, rows.reshape(right.shape), right))
    return A_CC


def forward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g_CK, S_VK):
    """Computes one head's o (C, V) and the state S' (V, K) that leaves the chunk, in float32. S_VK:
    the state that enters the chunk. qk_CC: q k^T. constants: from `constants`."""
    p = tiling.products
    q_CK, k_CK = q_CK.astype(jnp.float32) * tiling.scale, k_CK.astype(jnp.float32)
    # q exp(g_cumsum) and k exp(g_reversed) of every level, then of the whole chunk.
    tree = list(_tree(g_CK))
    *levels, (q_state_CK, k_state_CK) = [(q_CK * a, k_CK * b) for a, b in tree]
    A_CC = _scores(tiling, constants[0][...], qk_CC, levels)
    # o = A v + (q exp(g_cumsum)) S
    o_CV = p.rounded(A_CC, v_CV) + p.rounded(q_state_CK, S_VK, (1, 1))
    # S' = exp(g_total) S + (k exp(g_reversed))^T v, transposed
    exp_g_total_1K = tree[-1][0][tiling.C - 1 :]
    return o_CV, S_VK * exp_g_total_1K + p.rounded(v_CV, k_state_CK, (0, 0))


def backward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g_CK, S_VK, do_CV, dS_VK):
    """Computes one head's ChunkGradients from do and the cotangent dS' of the state that leaves.
    S_VK: the state that enters the chunk. qk_CC: q k^T. constants: from `constants`."""
    p, C = tiling.products, tiling.C
    level_CC = constants[0][...]
    q_CK, k_CK = q_CK.astype(jnp.float32) * tiling.scale, k_CK.astype(jnp.float32)
    tree = list(_tree(g_CK))
    *levels, (q_state_CK, k_state_CK) = [(q_CK * a, k_CK * b) for a, b in tree]
    A_CC = _scores(tiling, level_CC, qk_CC, levels)
    # dA = do v^T;  dv = A^T do + (k exp(g_reversed)) dS'
    dA_CC = p.rounded(do_CV, v_CV, (1, 1))
    dv_CV = p.rounded(A_CC, do_CV, (0, 0)) + p.rounded(k_state_CK, dS_VK, (1, 1))
    # Parts of dq and dk that pass through a state, before its decay.
    dq_state_CK, dk_state_CK = p.rounded(do_CV, S_VK), p.dot(v_CV, dS_VK)
    # dS = exp(g_total) dS' + (q exp(g_cumsum))^T do, and dg_total = sum_V of exp(g_total) dS' * S.
    decayed_dS_VK = dS_VK * tree[-1][0][C - 1 :]
    dg_total_1K = jnp.sum(decayed_dS_VK * S_VK.astype(jnp.float32), axis=0, keepdims=True)
    dS_entering_VK = decayed_dS_VK + p.rounded(do_CV, q_state_CK, (0, 0))

    # dq, dk: what passed through a state, and the pairs i = j, which do not decay.
    diagonal_C1 = jnp.sum(jnp.where(level_CC == SELF, dA_CC, 0.0), axis=1, keepdims=True)
    dq_CK = dq_state_CK * tree[-1][0] + diagonal_C1 * k_CK
    dk_CK = dk_state_CK * tree[-1][1] + diagonal_C1 * q_CK
    # dg, top down: p_i and e_j begin as what passed through a state, and each level adds its pairs.
    p_CK, e_CK = dq_state_CK * q_state_CK, dk_state_CK * k_state_CK
    dg = dg_total_1K[None]
    for n in reversed(range(len(levels))):
        U = 1 << n
        (ql_CK, kl_CK), (exp_g_cumsum_CK, exp_g_reversed_CK) = levels[n], tree[n]
        dg = _to_halves(dg, p_CK, e_CK, U)
        # Cotangents of this level's product, of the pairs that part here.
        dA_rows = jnp.where(_right(level_CC, U) == n, _right(dA_CC, U), 0.0)
        ql = _right(ql_CK, U)
        dql = p.dot(dA_rows, kl_CK)
        dkl_CK = p.dot(dA_rows, ql, (0, 0))
        dq_CK = dq_CK + _from_right(dql * _right(exp_g_cumsum_CK, U), U)
        dk_CK = dk_CK + dkl_CK * exp_g_reversed_CK
        p_CK = p_CK + _from_right(dql * ql, U)
        e_CK = e_CK + dkl_CK * kl_CK
    dg_CK = dg.reshape(p_CK.shape) + p_CK
    return ChunkGradients(dq_CK * tiling.scale, dk_CK, dv_CV, dg_CK, dS_entering_VK)


def _to_halves(dg_total, p_CK, e_CK, U):
    """Turns the cotangents of decay sums over blocks of 2 U tokens into those over their halves.

    p_CK, e_CK: cotangents of g_cumsum and g_reversed. A left half's total is a term of every
      g_cumsum in the right half, a right half's of every g_reversed in the left. Shapes of dg_total
      and the result: (blocks, 1, K), or for U below 8 a row per token, (C/8, 8, K).
    """
    C, K = p_CK.shape
    if U >= SUBLANES:
        right = jnp.sum(_halves(p_CK, U)[1], axis=1, keepdims=True)
        left = jnp.sum(_halves(e_CK, U)[0], axis=1, keepdims=True)
        both = jnp.stack([dg_total + right, dg_total + left], axis=1)
        return both.reshape(C // U, 1, K)
    row = iota((C // SUBLANES, SUBLANES, K), 1)
    p, e = (x.reshape(row.shape) for x in (p_CK, e_CK))
    # Sums over the rows of each half, then swapped between halves.
    sums = jnp.where(row & U > 0, p, e)
    width = 1
    while width < U:
        sums = sums + _swapped(sums, width, row)
        width *= 2
    return dg_total + _swapped(sums, U, row)
