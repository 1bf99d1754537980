"""One chunk of the delta rule inside a TPU kernel, with no decay or one decay per token and head.

The maps of `chunked.py`, with every decay applied to what a product gives, not to what goes in: q and k, the caller's own
bfloat16 arrays, reach the matrix unit as they are.

    A = beta * (k k^T) D  below the diagonal        Z = scale * (q k^T) D  with it
    R = beta * (v - through * k S)        U = (I + A)^{-1} R
    o = scale * through * q S + Z U        S' = total S + k^T (after * U)

D_ij = exp(g_{j+1} + ... + g_i) is the exponential of a product with zeros and ones, in which nothing is subtracted.
"""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas import tpu_blocks
from kernels_pallas.tpu_blocks import Products, iota, lower


class Gates(NamedTuple):
    """Of one head. Without a decay D is None, and so are the three that follow.

    through_C1: what the entering state has decayed by at token i; after_C1: what token j has in the leaving state.
    """

    beta_C1: jnp.ndarray
    D_CC: jnp.ndarray | None = None
    through_C1: jnp.ndarray | None = None
    after_C1: jnp.ndarray | None = None
    total_11: jnp.ndarray | None = None


def gates_of(p: Products, heads: int, rows_RC) -> list[Gates]:
    """rows: beta of each head, then log decay of each, where there is one."""
    C = rows_RC.shape[1]
    if rows_RC.shape[0] == heads:
        columns_CR = rows_RC.T
        return [Gates(columns_CR[:, h : h + 1]) for h in range(heads)]
    beta_HC, g_HC = rows_RC[:heads], tpu_blocks.finite(rows_RC[heads:])
    ones = jnp.bfloat16 if p.narrow else jnp.float32
    up_to = lower(C).astype(ones)  # token s is in the sum up to i: s <= i, at (i, s)
    behind = (~lower(C)).astype(ones)  # token s is behind j: s > j, at (j, s)
    through_HC = jnp.exp(p.sums(g_HC, up_to, (1, 1)))
    after_HC = jnp.exp(p.sums(g_HC, behind, (1, 1)))
    columns_CR = jnp.concatenate([beta_HC, through_HC, after_HC], axis=0).T
    gates = []
    for h in range(heads):
        between_CC = p.sums(jnp.where(lower(C), g_HC[h : h + 1], 0.0), behind, (1, 1))
        beta_C1, through_C1, after_C1 = (
            columns_CR[:, n : n + 1] for n in (h, heads + h, 2 * heads + h)
        )
        D_CC = jnp.where(lower(C), jnp.exp(between_CC), 0.0)
        total_11 = through_HC[h : h + 1, C - 1 :]
        gates.append(Gates(beta_C1, D_CC, through_C1, after_C1, total_11))
    return gates


class Chunk(NamedTuple):
    """What the forward pass of one chunk has computed, for the backward pass."""

    A_CC: jnp.ndarray
    lost_CC: jnp.ndarray | None
    X_CC: jnp.ndarray
    Z_CC: jnp.ndarray
    kS_CV: jnp.ndarray
    read_CV: jnp.ndarray
    U_CV: jnp.ndarray


def _times(x, factor):
    return x if factor is None else x * factor


def chunk(p: Products, gates: Gates, scale, qk_CC, kk_CC, lost_CC, k_CK, v_CV, S_KV) -> Chunk:
    C = k_CK.shape[0]
    A_CC = jnp.where(lower(C, -1), gates.beta_C1 * _times(kk_CC, gates.D_CC), 0.0)
    if lost_CC is not None:
        lost_CC = jnp.where(lower(C, -1), gates.beta_C1 * _times(lost_CC, gates.D_CC), 0.0)
    Z_CC = scale * (jnp.where(lower(C), qk_CC, 0.0) if gates.D_CC is None else qk_CC * gates.D_CC)
    X_CC = tpu_blocks.inverse(p, A_CC)
    kS_CV = _times(p.state(k_CK, S_KV), gates.through_C1)
    read_CV = v_CV.astype(jnp.float32) - kS_CV
    U_CV = _solve(p, A_CC, lost_CC, X_CC, gates.beta_C1 * read_CV, 1)
    return Chunk(A_CC, lost_CC, X_CC, Z_CC, kS_CV, read_CV, U_CV)


def lost_products(p: Products, k_CK, kk_CC):
    """What float32 loses of k k^T, where that counts."""
    if not p.exact:
        return None
    exact_CC, rest_CC = p.exact_product(k_CK, k_CK, (1, 1))
    return (exact_CC - kk_CC) + rest_CC


def _solve(p, A_CC, lost_CC, X_CC, R_CV, axis):
    """(I + A)^{-1} R, or with axis 0 of the transposed, corrected by its residual where rounding counts."""
    axes = (axis, 0)
    U_CV = p.fine(X_CC, R_CV, axes)
    if lost_CC is None:
        return U_CV
    exact_CV, rest_CV = p.exact_product(A_CC, U_CV, axes)
    residual_CV = R_CV - U_CV - exact_CV - (rest_CV + p.fine(lost_CC, U_CV, axes))
    return U_CV + p.fine(X_CC, residual_CV, axes)


def output(p: Products, gates: Gates, scale, q_CK, c: Chunk, S_KV):
    return scale * _times(p.coarse(q_CK, S_KV), gates.through_C1) + p.coarse(c.Z_CC, c.U_CV)


def next_state(p: Products, gates: Gates, k_CK, c: Chunk, S_KV):
    written_KV = p.state(k_CK, _times(c.U_CV, gates.after_C1), (0, 0))
    return _times(S_KV, gates.total_11) + written_KV


class Cotangents(NamedTuple):
    """Of one head's chunk. dqk and dkk are those of q k^T and k k^T, which heads may share; dq and dk are the rest."""

    dqk_CC: jnp.ndarray
    dkk_CC: jnp.ndarray
    dq_CK: jnp.ndarray
    dk_CK: jnp.ndarray
    dv_CV: jnp.ndarray
    dbeta_1C: jnp.ndarray
    dg_1C: jnp.ndarray | None
    dS_KV: jnp.ndarray


def backward(
    p: Products, gates: Gates, scale, qk_CC, kk_CC, c: Chunk, q_CK, k_CK, S_KV, do_CV, dS_KV
) -> Cotangents:
    """From the cotangents of the output and of the state that leaves."""
    C = k_CK.shape[0]
    beta_C1, D_CC, through_C1, after_C1, _ = gates
    kdS_CV = p.state(k_CK, dS_KV)
    dU_CV = p.coarse(c.Z_CC, do_CV, (0, 0)) + _times(kdS_CV, after_C1)
    dR_CV = _solve(p, c.A_CC, c.lost_CC, c.X_CC, dU_CV, 0)
    dv_CV = beta_C1 * dR_CV
    dread_CV = _times(dv_CV, through_C1)  # of -k S
    doS_CV = scale * _times(do_CV.astype(jnp.float32), through_C1)  # of q S
    dA_CC = jnp.where(lower(C, -1), -p.coarse(dR_CV, c.U_CV, (1, 1)), 0.0)
    dZ_CC = jnp.where(lower(C), p.coarse(do_CV, c.U_CV, (1, 1)), 0.0)
    dq_CK = p.coarse(doS_CV, S_KV, (1, 1))
    dk_CK = p.coarse(_times(c.U_CV, after_C1), dS_KV, (1, 1)) - p.coarse(dread_CV, S_KV, (1, 1))
    dkk_CC, dqk_CC = _times(beta_C1 * dA_CC, D_CC), _times(scale * dZ_CC, D_CC)
    dbeta_C1 = _row_sums(dR_CV * c.read_CV) + _row_sums(_times(dA_CC * kk_CC, D_CC))
    dg_1C = None
    if D_CC is not None:
        qS_CV = p.coarse(q_CK, S_KV)
        pairs_CC = dA_CC * c.A_CC + dZ_CC * c.Z_CC
        of_through_C1 = _row_sums(doS_CV * qS_CV - dv_CV * c.kS_CV)
        of_after_C1 = _row_sums(c.U_CV * kdS_CV) * after_C1
        of_total_11 = jnp.sum(_row_sums(dS_KV * S_KV), axis=0, keepdims=True) * gates.total_11
        dg_1C = _decay_cotangent(p, pairs_CC, of_through_C1, of_after_C1) + of_total_11
    dS_KV = (
        _times(dS_KV, gates.total_11)
        + p.state(q_CK, doS_CV, (0, 0))
        - p.state(k_CK, dread_CV, (0, 0))
    )
    return Cotangents(dqk_CC, dkk_CC, dq_CK, dk_CK, dv_CV, row_of(dbeta_C1), dg_1C, dS_KV)


def _decay_cotangent(p, pairs_CC, through_C1, after_C1):
    """Of g_s: the sum over all i >= s > j of what the decay between j and i has, and likewise from and to the chunk's ends."""
    C = pairs_CC.shape[0]
    behind = (~lower(C)).astype(jnp.bfloat16 if p.narrow else jnp.float32)
    between_CC = p.sums(pairs_CC, behind) + through_C1
    return jnp.sum(jnp.where(lower(C), between_CC, after_C1), axis=0, keepdims=True)


def _row_sums(x):
    return jnp.sum(x, axis=1, keepdims=True)


def row_of(x_C1):
    C = x_C1.shape[0]
    diagonal = iota((C, C), 0) == iota((C, C), 1)
    return jnp.sum(jnp.where(diagonal, x_C1, 0.0), axis=0, keepdims=True)
