"""A chunk of linear attention with a decay per key channel, inside a TPU kernel.

A chunk is halved again and again, as in `decay_sums`: tokens j < i part at one level, j into a left
half of U tokens and i into the right half beside it, and there

    exp(g_{j+1} + ... + g_i) = through_i * behind_j,
    through_i = the product of the decays from the middle up to i,  behind_j = that of the tokens
      after j, up to the middle.

Here these are products of decays in [0, 1], each level's from the level below by one
multiplication:

    through'_i = through_i, times the whole left half where i is in the right one,
    behind'_j  = behind_j, times the whole right half where j is in the left one.

No exponent is ever added up or subtracted; a reset is a factor 0. Each level is one product (q
through)(k behind)^T, of which the pairs that part there are kept; at the top, through and behind
decay what enters and what leaves. The state stands as (V, K): its decay lies along the lanes.

Backward, each level has p_i = (the cotangent of log through_i) and e_j, that of log behind_j, and
the gradient of g is their sum back through the same tree, top down: sums of like terms.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.tpu.primitives import SUBLANES, iota
from kernels_pallas.tpu.products import Gradients, dot, fine

SELF, NEVER_MEET = -1, -2  # "levels" of the pairs i = j and i < j


def constants(tiling, backward):
    """(C, C) int32: the level at which i and j part."""
    del backward
    i, j = np.arange(tiling.C)[:, None], np.arange(tiling.C)[None]
    level = np.frexp((i ^ j).astype(np.float64))[1] - 1
    return (jnp.asarray(np.where(i < j, NEVER_MEET, level), jnp.int32),)


def shared(tiling, q_CK, k_CK):
    """What all value heads of a key head need once: the scores, of which the diagonal decays by
    nothing."""
    return dot(tiling.narrow, q_CK, k_CK, (1, 1))


def _tree(g_CK):
    """(through, behind) by level, smallest halves first, and at the end those of the whole chunk."""
    C, K = g_CK.shape
    through, behind = jnp.exp(g_CK), jnp.ones_like(g_CK)
    U = 1
    yield through, behind
    while U < C:
        through, behind = (_small_step if U < SUBLANES else _large_step)(through, behind, U)
        yield through, behind
        U *= 2


def _small_step(through_CK, behind_CK, U):
    """Halves inside a register's 8 rows."""
    C, K = through_CK.shape
    through, behind = (x.reshape(C // SUBLANES, SUBLANES, K) for x in (through_CK, behind_CK))
    row = iota(through.shape, 1)
    right = row & U > 0
    # The last row of each half is that half's whole decay: seen from the half beside it.
    if U == 1:
        beside = _swapped(through, 1, row)
    elif U == 2:
        lower, upper = (_swapped_last(through, first, row & 2 > 0) for first in (0, 4))
        beside = jnp.where(row < 4, lower, upper)
    else:
        beside = _swapped_last(through, 0, right, 4)
    through = jnp.where(right, through * beside, through)
    behind = jnp.where(right, behind, behind * beside)
    return through.reshape(C, K), behind.reshape(C, K)


def _swapped_last(x, first, right, U=2):
    """The last row of the other half, in a block of 2 U rows from `first` on."""
    left_last = x[:, first + U - 1 : first + U]
    right_last = x[:, first + 2 * U - 1 : first + 2 * U]
    return jnp.where(right, left_last, right_last)


def _swapped(x, U, row):
    """Neighbouring halves of U rows (1, 2 or 4) change places."""
    up, down = _roll(x, SUBLANES - U), _roll(x, U)
    return down if U == 4 else jnp.where(row & U > 0, down, up)


def _roll(x, by):
    """Rows of each register, `by` places on."""
    return jnp.roll(x, by, axis=1)


def _large_step(through_CK, behind_CK, U):
    """Halves of whole registers."""
    left, right = _halves(through_CK, U)
    behind_left, behind_right = _halves(behind_CK, U)
    through = _joined(left, right * left[:, U - 1 :])
    return through, _joined(behind_left * right[:, U - 1 :], behind_right)


def _halves(x_CK, U):
    """(M, U, K) twice: left halves and right halves."""
    C, K = x_CK.shape
    x = x_CK.reshape(C // (2 * U), 2, U, K)
    return x[:, 0], x[:, 1]


def _joined(left_MUK, right_MUK):
    M, U, K = left_MUK.shape
    return jnp.stack([left_MUK, right_MUK], axis=1).reshape(2 * M * U, K)


def _right(x_CK, U):
    """The rows of the right halves, (C/2, K); all rows where halves are smaller than a register."""
    if U < SUBLANES:
        return x_CK
    _, right_MUK = _halves(x_CK, U)
    return right_MUK.reshape(-1, x_CK.shape[1])


def _from_right(x, U):
    """Back to all rows, zeros on the left."""
    if U < SUBLANES:
        return x
    x_MUK = x.reshape(-1, U, x.shape[1])
    return _joined(jnp.zeros_like(x_MUK), x_MUK)


def _with_level(tiling, n, level_CC, A_CC, q_CK, k_CK):
    """A_ij = sum_K q_i k_j where i and j part at level n, for q and k decayed up to there."""
    U = 1 << n
    rows = dot(tiling.narrow, _right(q_CK, U), k_CK, (1, 1))
    if U < SUBLANES:
        return jnp.where(level_CC == n, rows, A_CC)
    left, right = _halves(A_CC, U)
    mask = _halves(level_CC, U)[1] == n
    return _joined(left, jnp.where(mask, rows.reshape(right.shape), right))


def forward(tiling, constants, q_CK, k_CK, s_CC, v_CV, g_CK, S_VK):
    """The chunk's output and the state behind it, float32."""
    narrow = tiling.narrow
    level_CC = constants[0][...]
    q_CK, k_CK = q_CK.astype(jnp.float32) * tiling.scale, k_CK.astype(jnp.float32)
    A_CC = jnp.where(level_CC == SELF, s_CC * tiling.scale, 0.0)
    for n, (through, behind) in enumerate(_tree(g_CK)):
        if 1 << n < tiling.C:
            A_CC = _with_level(tiling, n, level_CC, A_CC, q_CK * through, k_CK * behind)
    o_CV = dot(narrow, A_CC, v_CV) + dot(narrow, q_CK * through, S_VK, (1, 1))
    total_1K = through[tiling.C - 1 :]
    return o_CV, S_VK * total_1K + dot(narrow, v_CV, k_CK * behind, (0, 0))


def backward(tiling, constants, q_CK, k_CK, s_CC, v_CV, g_CK, S_VK, d_o_CV, d_S_VK):
    """The chunk's gradients, from the cotangents of its output and of the state behind it."""
    narrow, C = tiling.narrow, tiling.C
    level_CC = constants[0][...]
    q_CK, k_CK = q_CK.astype(jnp.float32) * tiling.scale, k_CK.astype(jnp.float32)
    tree = list(_tree(g_CK))
    *levels, (q_in_CK, k_out_CK) = [(q_CK * a, k_CK * b) for a, b in tree]
    A_CC = jnp.where(level_CC == SELF, s_CC * tiling.scale, 0.0)
    for n, (ql_CK, kl_CK) in enumerate(levels):
        A_CC = _with_level(tiling, n, level_CC, A_CC, ql_CK, kl_CK)
    d_A_CC = dot(narrow, d_o_CV, v_CV, (1, 1))
    d_v_CV = dot(narrow, A_CC, d_o_CV, (0, 0)) + dot(narrow, k_out_CK, d_S_VK, (1, 1))
    d_q_in_CK, d_k_out_CK = dot(narrow, d_o_CV, S_VK), fine(narrow, v_CV, d_S_VK)
    total_1K = tree[-1][0][C - 1 :]
    kept_VK = d_S_VK * total_1K
    d_total_1K = jnp.sum(kept_VK * S_VK.astype(jnp.float32), axis=0, keepdims=True)
    d_S = kept_VK + dot(narrow, d_o_CV, q_in_CK, (0, 0))

    itself_CC = jnp.where(level_CC == SELF, d_A_CC, 0.0)
    itself_C1 = jnp.sum(itself_CC, axis=1, keepdims=True)
    d_q_CK = d_q_in_CK * tree[-1][0] + itself_C1 * k_CK
    d_k_CK = d_k_out_CK * tree[-1][1] + itself_C1 * q_CK
    p_CK, e_CK = d_q_in_CK * q_in_CK, d_k_out_CK * k_out_CK
    d_g = d_total_1K[None]
    for n in reversed(range(len(levels))):
        U = 1 << n
        (ql_CK, kl_CK), (through_CK, behind_CK) = levels[n], tree[n]
        d_g = _down(d_g, p_CK, e_CK, U)
        d_rows = jnp.where(_right(level_CC, U) == n, _right(d_A_CC, U), 0.0)
        ql = _right(ql_CK, U)
        d_ql = fine(narrow, d_rows, kl_CK)
        d_kl_CK = fine(narrow, d_rows, ql, (0, 0))
        d_q_CK = d_q_CK + _from_right(d_ql * _right(through_CK, U), U)
        d_k_CK = d_k_CK + d_kl_CK * behind_CK
        p_CK = p_CK + _from_right(d_ql * ql, U)
        e_CK = e_CK + d_kl_CK * kl_CK
    d_g_CK = d_g.reshape(p_CK.shape) + p_CK
    return Gradients(d_q_CK * tiling.scale, d_k_CK, d_v_CV, d_g_CK, d_S)


def _down(d_whole, p_CK, e_CK, U):
    """The cotangent of the whole sums of blocks of 2 U tokens to that of blocks of U: (blocks, 1,
    K), or from 8 rows down a row for each token, (C/8, 8, K)."""
    C, K = p_CK.shape
    if U >= SUBLANES:
        right = jnp.sum(_halves(p_CK, U)[1], axis=1, keepdims=True)
        left = jnp.sum(_halves(e_CK, U)[0], axis=1, keepdims=True)
        both = jnp.stack([d_whole + right, d_whole + left], axis=1)
        return both.reshape(C // U, 1, K)
    row = iota((C // SUBLANES, SUBLANES, K), 1)
    p, e = (x.reshape(row.shape) for x in (p_CK, e_CK))
    sums = jnp.where(row & U > 0, p, e)
    width = 1
    while width < U:
        sums = sums + _swapped(sums, width, row)
        width *= 2
    return d_whole + _swapped(sums, U, row)
