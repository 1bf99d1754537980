"""One chunk of the delta rule inside a TPU kernel, with a decay per key channel.

As `tpu_head_decay.py`, with the decays inside the products. A chunk is halved again and again (see
`decay_sums`): tokens j < i part at one level, and there the decay between them is exp(after_j)
exp(through_i), two exponentials of sums from that level's middle. A token is in one half only, so a
level has one exponential per token and channel.

    level l   E = exp(after_j) in left halves of 2^l tokens, exp(through_i) in right halves
              (k E)(k E)^T and (q E)(k E)^T, of which A and Z take the pairs that part there
    A = beta * those of k        Z = scale * those of q, and q_i . k_i on the diagonal
    R = beta * (v - (k through) S)        U = (I + A)^{-1} R
    o = scale * (q through) S + Z U        S' = total S + (k after)^T U
"""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.ops.delta_rule.tpu.per_token import Cotangents, solve
from kernels_pallas.tpu import primitives
from kernels_pallas.tpu.primitives import Products, column_of, iota, lower, row_of, row_sums


class Gates(NamedTuple):
    """Of one head: beta and the log decay."""

    beta_C1: jnp.ndarray
    g_CK: jnp.ndarray


class Chunk(NamedTuple):
    """What the forward pass of one chunk has computed. levels: E_CK of each. lost_CC: what A has
    lost to rounding."""

    levels: list[jnp.ndarray]
    through_CK: jnp.ndarray
    after_CK: jnp.ndarray
    kk_CC: jnp.ndarray
    A_CC: jnp.ndarray
    lost_CC: jnp.ndarray | None
    X_CC: jnp.ndarray
    Z_CC: jnp.ndarray
    read_CV: jnp.ndarray
    U_CV: jnp.ndarray


def gates_of(p: Products, heads: int, rows_RC, g_CHK) -> list[Gates]:
    """rows: beta of each head. g: the heads side by side."""
    columns_CR = rows_RC.T
    K = g_CHK.shape[1] // heads
    return [Gates(columns_CR[:, h : h + 1], g_CHK[:, h * K : (h + 1) * K]) for h in range(heads)]


def _parting(C, rows=1, columns=1):
    """i xor j, whose highest bit is the level at which tokens i and j part; repeated down or along."""
    shape = (rows * C, columns * C)
    return (iota(shape, 0) % C) ^ (iota(shape, 1) % C)


def _chunk(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    C = k_CK.shape[0]
    sums = primitives.halving_sums(gates.g_CK)
    through_CK, after_CK, *levels = (jnp.exp(x) for x in sums)
    yield
    qk_CC, kk_CC = row_sums(q_CK * k_CK), jnp.zeros((C, C), jnp.float32)
    lost_CC = kk_CC if p.exact else None
    for level, E_CK in enumerate(levels):
        kE_CK = k_CK * E_CK
        both = p.dot(jnp.concatenate([q_CK * E_CK, kE_CK], axis=0), kE_CK, (1, 1))
        here = _parting(C) >= 1 << level
        qk_CC, kk_CC = jnp.where(here, both[:C], qk_CC), jnp.where(here, both[C:], kk_CC)
        if p.exact:
            exact_CC, rest_CC = p.exact_product(kE_CK, kE_CK, (1, 1))
            lost_CC = jnp.where(here, (exact_CC - both[C:]) + rest_CC, lost_CC)
        yield
    A_CC = jnp.where(lower(C, -1), gates.beta_C1 * kk_CC, 0.0)
    if p.exact:
        lost_CC = jnp.where(lower(C, -1), gates.beta_C1 * lost_CC, 0.0)
    Z_CC = jnp.where(lower(C), scale * qk_CC, 0.0)
    X_CC = yield from primitives.inverse(p, A_CC)
    read_CV = v_CV.astype(jnp.float32) - _state(p, k_CK * through_CK, S_KV)
    yield
    U_CV = solve(p, A_CC, lost_CC, X_CC, gates.beta_C1 * read_CV, 1)
    yield
    return Chunk(levels, through_CK, after_CK, kk_CC, A_CC, lost_CC, X_CC, Z_CC, read_CV, U_CV)


def _state(p, x, y, axes=(1, 0)):
    """A product by which states become states: rounded once where that counts."""
    return p.state(x, y, axes) if p.exact else p.dot(x, y, axes)


def forward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV):
    """The output, and the state that leaves. A generator, for `tpu_blocks.in_turns`."""
    q_CK, k_CK = q_CK.astype(jnp.float32), k_CK.astype(jnp.float32)
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    C = k_CK.shape[0]
    written_KV = _state(p, k_CK * c.after_CK, c.U_CV, (0, 0))
    S_next_KV = column_of(c.through_CK[C - 1 :]) * S_KV + written_KV
    yield
    o_CV = scale * p.dot(q_CK * c.through_CK, S_KV)
    yield
    o_CV = o_CV + p.dot(c.Z_CC, c.U_CV)
    yield
    return o_CV, S_next_KV


def backward(p: Products, gates: Gates, scale, q_CK, k_CK, v_CV, S_KV, do_CV, dS_KV):
    """The Cotangents, from those of the output and of the state that leaves. A generator."""
    q_CK, k_CK = q_CK.astype(jnp.float32), k_CK.astype(jnp.float32)
    c = yield from _chunk(p, gates, scale, q_CK, k_CK, v_CV, S_KV)
    C = k_CK.shape[0]
    beta_C1, through_CK, after_CK = gates.beta_C1, c.through_CK, c.after_CK
    total_1K = through_CK[C - 1 :]
    q_through_CK, k_through_CK, k_after_CK = q_CK * through_CK, k_CK * through_CK, k_CK * after_CK
    dU_CV = _state(p, k_after_CK, dS_KV)
    yield
    dU_CV = dU_CV + p.dot(c.Z_CC, do_CV, (0, 0))
    yield
    dR_CV = solve(p, c.A_CC, c.lost_CC, c.X_CC, dU_CV, 0)
    dv_CV = beta_C1 * dR_CV
    yield
    dS_next_KV = column_of(total_1K) * dS_KV - _state(p, k_through_CK, dv_CV, (0, 0))
    yield
    dS_next_KV = dS_next_KV + scale * p.dot(q_through_CK, do_CV, (0, 0))
    yield
    dA_CC = jnp.where(lower(C, -1), -p.dot(dR_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dqk_CC = jnp.where(lower(C), scale * p.dot(do_CV, c.U_CV, (1, 1)), 0.0)
    yield
    dkk_CC = beta_C1 * dA_CC
    dbeta_C1 = row_sums(dR_CV * c.read_CV) + row_sums(dA_CC * c.kk_CC)

    dq_through_CK = scale * p.dot(do_CV, S_KV, (1, 1))
    yield
    dk_through_CK = -p.dot(dv_CV, S_KV, (1, 1))
    yield
    dk_after_CK = p.dot(c.U_CV, dS_KV, (1, 1))
    yield
    dtotal_1K = row_of(row_sums(dS_KV * S_KV))
    diagonal_C1 = row_sums(jnp.where(_parting(C) == 0, dqk_CC, 0.0))
    dq_CK = dq_through_CK * through_CK + diagonal_C1 * k_CK
    dk_CK = dk_through_CK * through_CK + dk_after_CK * after_CK + diagonal_C1 * q_CK
    dthrough_CK = dq_through_CK * q_through_CK + dk_through_CK * k_through_CK
    dafter_CK = dk_after_CK * k_after_CK
    yield

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
    dg_CK = primitives.halving_sums_cotangent(dthrough_CK, dafter_CK, dlevels)
    dg_CK = dg_CK + dtotal_1K * total_1K
    return Cotangents(dq_CK, dk_CK, dv_CV, row_of(dbeta_C1), dg_CK, dS_next_KV)
