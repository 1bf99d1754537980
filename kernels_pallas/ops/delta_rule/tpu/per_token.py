"""One chunk of the delta rule inside a TPU kernel, with no decay or one decay per token and head.

The maps of `chunked.py`, with every decay applied to what a product gives, not to what goes in: q
and k, the caller's own bfloat16 arrays, reach the matrix unit as they are.

    A = beta * (k k^T) D  below the diagonal        Z = scale * (q k^T) D  with it
    R = beta * (v - through * k S)        U = (I + A)^{-1} R
    o = scale * through * q S + Z U        S' = total S + k^T (after * U)

D_ij = exp(g_{j+1} + ... + g_i) is the exponential of a product with zeros and ones, in which
nothing is subtracted. `tpu_channel_decay.py` has the same functions for a decay per channel.
"""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.tpu import primitives
from kernels_pallas.tpu.primitives import Products, lower, row_of, row_sums


class Gates(NamedTuple):
    """Of one head. Without a decay D is None, and so are the three that follow.

    through_C1: what the entering state has decayed by at token i; after_C1: what token j has in the
      leaving state.
    """

    beta_C1: jnp.ndarray
    D_CC: jnp.ndarray | None = None
    through_C1: jnp.ndarray | None = None
    after_C1: jnp.ndarray | None = None
    total_11: jnp.ndarray | None = None


class Chunk(NamedTuple):
    """What the forward pass of one chunk has computed. lost_CC: what A has lost to rounding, where
    that counts."""

    qk_CC: jnp.ndarray
    kk_CC: jnp.ndarray
    A_CC: jnp.ndarray
    lost_CC: jnp.ndarray | None
    X_CC: jnp.ndarray
    Z_CC: jnp.ndarray
    kS_CV: jnp.ndarray
    read_CV: jnp.ndarray
    U_CV: jnp.ndarray


class Cotangents(NamedTuple):
    """Of one head's chunk; dg as the decay came in, or None."""

    dq_CK: jnp.ndarray
    dk_CK: jnp.ndarray
    dv_CV: jnp.ndarray
    dbeta_1C: jnp.ndarray
    dg: jnp.ndarray | None
    dS_KV: jnp.ndarray


def gates_of(p: Products, heads: int, rows_RC, g_CHK=None) -> list[Gates]:
    """rows: beta of each head, then log decay of each, where there is one."""
    C = rows_RC.shape[1]
    if rows_RC.shape[0] == heads:
        columns_CR = rows_RC.T
        return [Gates(columns_CR[:, h : h + 1]) for h in range(heads)]
    beta_HC, g_HC = rows_RC[:heads], rows_RC[heads:]
    up_to, behind = p.ones(lower(C)), p.ones(~lower(C))  # at (i, s): s <= i, s > i
    through_HC = jnp.exp(p.dot(g_HC, up_to, (1, 1)))
    after_HC = jnp.exp(p.dot(g_HC, behind, (1, 1)))
    columns_CR = jnp.concatenate([beta_HC, through_HC, after_HC], axis=0).T
    gates = []
    for h in range(heads):
        between_CC = p.dot(jnp.where(lower(C), g_HC[h : h + 1], 0.0), behind, (1, 1))
        beta_C1, through_C1, after_C1 = (
            columns_CR[:, n : n + 1] for n in (h, heads + h, 2 * heads + h)
        )
        D_CC = jnp.where(lower(C), jnp.exp(between_CC), 0.0)
        total_11 = through_HC[h : h + 1, C - 1 :]
        gates.append(Gates(beta_C1, D_CC, through_C1, after_C1, total_11))
    return gates


def _times(x, factor):
    return x if factor is None else x * factor


def _chunk(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV) -> Chunk:
    C = k_CK.shape[0]
    qk_CC, kk_CC = p.dot(q_CK, k_CK, (1, 1)), p.dot(k_CK, k_CK, (1, 1))
    yield

    def below(products_CC):
        return jnp.where(lower(C, -1), gates.beta_C1 * _times(products_CC, gates.D_CC), 0.0)

    lost_CC = None
    if p.exact:
        exact_CC, rest_CC = p.exact_product(k_CK, k_CK, (1, 1))
        lost_CC = below((exact_CC - kk_CC) + rest_CC)
    A_CC = below(kk_CC)
    Z_CC = scale * (jnp.where(lower(C), qk_CC, 0.0) if gates.D_CC is None else qk_CC * gates.D_CC)
    X_CC = yield from primitives.inverse(p, A_CC)
    kS_CV = _times(p.state(k_CK, S_KV), gates.through_C1)
    read_CV = v_CV.astype(jnp.float32) - kS_CV
    yield
    U_CV = solve(p, A_CC, lost_CC, X_CC, gates.beta_C1 * read_CV, 1)
    yield
    return Chunk(qk_CC, kk_CC, A_CC, lost_CC, X_CC, Z_CC, kS_CV, read_CV, U_CV)


def solve(p, A_CC, lost_CC, X_CC, R_CV, axis):
    """(I + A)^{-1} R, or with axis 0 of the transposed, corrected by its residual where rounding
    counts."""
    axes = (axis, 0)
    U_CV = p.precise(X_CC, R_CV, axes)
    if lost_CC is None:
        return U_CV
    # A unit of its own for every document's U: what is multiplied by 0 must not change how the rest
    # is rounded.
    squares_CV = U_CV * U_CV
    linked_CC = p.ones((A_CC != 0) | (A_CC.T != 0))
    squares_CV = squares_CV + p.dot(linked_CC, squares_CV)
    exact_CV, rest_CV = p.exact_product(A_CC, U_CV, axes, squares_CV)
    residual_CV = R_CV - U_CV - exact_CV - (rest_CV + p.dot(lost_CC, U_CV, axes))
    return U_CV + p.dot(X_CC, residual_CV, axes)


def forward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    """The output, and the state that leaves. A generator, for `tpu_blocks.in_turns`."""
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    written_KV = p.state(k_CK, _times(c.U_CV, gates.after_C1), (0, 0))
    S_next_KV = _times(S_KV, gates.total_11) + written_KV
    yield
    o_CV = scale * _times(p.dot(q_CK, S_KV), gates.through_C1)
    yield
    o_CV = o_CV + p.dot(c.Z_CC, c.U_CV)
    yield
    return o_CV, S_next_KV


def backward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV, do_CV, dS_KV):
    """The Cotangents, from those of the output and of the state that leaves. A generator."""
    C = k_CK.shape[0]
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    beta_C1, D_CC, through_C1, after_C1, total_11 = gates
    kdS_CV = p.state(k_CK, dS_KV)
    yield
    dU_CV = p.dot(c.Z_CC, do_CV, (0, 0)) + _times(kdS_CV, after_C1)
    yield
    dR_CV = solve(p, c.A_CC, c.lost_CC, c.X_CC, dU_CV, 0)
    dv_CV = beta_C1 * dR_CV
    dkS_CV = _times(dv_CV, through_C1)  # less than zero: of -k S
    dqS_CV = scale * _times(do_CV.astype(jnp.float32), through_C1)
    yield
    dS_next_KV = _times(dS_KV, total_11) - p.state(k_CK, dkS_CV, (0, 0))
    yield
    dS_next_KV = dS_next_KV + p.state(q_CK, dqS_CV, (0, 0))
    yield
    dA_CC = jnp.where(lower(C, -1), -p.dot(dR_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dZ_CC = jnp.where(lower(C), p.dot(do_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dkk_CC, dqk_CC = _times(beta_C1 * dA_CC, D_CC), _times(scale * dZ_CC, D_CC)
    dbeta_C1 = row_sums(dR_CV * c.read_CV) + row_sums(_times(dA_CC * c.kk_CC, D_CC))
    dg_1C = None
    if D_CC is not None:
        pairs_CC = dA_CC * c.A_CC + dZ_CC * c.Z_CC
        of_through_C1 = row_sums(dqS_CV * p.dot(q_CK, S_KV) - dv_CV * c.kS_CV)
        yield
        of_after_C1 = row_sums(c.U_CV * kdS_CV) * after_C1
        of_total_11 = jnp.sum(row_sums(dS_KV * S_KV), axis=0, keepdims=True) * total_11
        dg_1C = _decay_cotangent(p, pairs_CC, of_through_C1, of_after_C1) + of_total_11
        yield
    dq_CK = p.dot(dqS_CV, S_KV, (1, 1))
    yield
    dq_CK = dq_CK + p.dot(dqk_CC, k_CK)
    yield
    dk_CK = p.dot(_times(c.U_CV, after_C1), dS_KV, (1, 1))
    yield
    dk_CK = dk_CK - p.dot(dkS_CV, S_KV, (1, 1))
    yield
    dk_CK = dk_CK + p.dot(dqk_CC, q_CK, (0, 0))
    yield
    dk_CK = dk_CK + p.dot(dkk_CC, k_CK)
    yield
    dk_CK = dk_CK + p.dot(dkk_CC, k_CK, (0, 0))
    yield
    return Cotangents(dq_CK, dk_CK, dv_CV, row_of(dbeta_C1), dg_1C, dS_next_KV)


def _decay_cotangent(p, pairs_CC, through_C1, after_C1):
    """Of g_s: the sum over i >= s > j of what the decay between j and i has, and likewise from and
    to the chunk's ends."""
    C = pairs_CC.shape[0]
    between_CC = p.dot(pairs_CC, p.ones(~lower(C))) + through_C1
    return jnp.sum(jnp.where(lower(C), between_CC, after_C1), axis=0, keepdims=True)
