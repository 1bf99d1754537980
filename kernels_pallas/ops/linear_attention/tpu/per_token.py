"""A chunk of linear attention with one decay a head, or none, inside a TPU kernel.

With g the log decays of a chunk's tokens, D_ij = exp(g_{j+1} + ... + g_i) for j <= i and 0 above,
b_i = exp(g_1 + ... + g_i), r_j = exp(g_{j+1} + ... + g_C), and S (K, V) the state that enters,

    o = scale * ((q k^T * D) v + b q S)        S' = b_C S + (r k)^T v.

Every exponent is a sum of g itself, by a product with zeros and ones: sum_s [s <= i] g_s [s > j]
for D, and with a column of ones [s <= i] g_s for b, 128 times side by side, as a multiplication
along the lanes wants it. r is D's last row. bfloat16 inputs keep 16 bits of g in these sums,
float32 ones all. Nothing is subtracted.

The gradient of g_s is a sum over what decays across s, P_ij = (the cotangent of D_ij) * D_ij for i
>= s > j, with the entering state as one more j (c_i) and the leaving state as one more i (e_j):
again products with zeros and ones.
"""

import jax.numpy as jnp

from kernels_pallas.tpu.primitives import LANES, iota
from kernels_pallas.tpu.products import Gradients, dot, fine, operand, terms, wide


def constants(tiling, backward):
    """[s > j | 1], by rows s, twice if narrow; for the backward pass also [s > j], by rows j."""
    if tiling.decay == "none":
        return ()
    token = jnp.arange(tiling.C)
    behind_SC = (token[:, None] > token[None]).astype(tiling.dtype)
    sums = jnp.concatenate([behind_SC, jnp.ones((tiling.C, LANES), tiling.dtype)], axis=1)
    sums = jnp.concatenate([sums] * (2 if tiling.narrow else 1), axis=0)
    if not backward:
        return (sums,)
    ones = jnp.ones((tiling.K, tiling.C), tiling.dtype)
    return sums, jnp.concatenate([behind_SC.T, ones], axis=0)


def shared(tiling, q_CK, k_CK):
    """What all value heads of a key head need once."""
    return dot(tiling.narrow, q_CK, k_CK, (1, 1))


def _masks(C):
    i, j = iota((C, C), 0), iota((C, C), 1)
    return j <= i, j < i


def _decays(tiling, constants, g_1C):
    """D (C, C), b (C, 128 equal lanes), r (1, C), b_C (1, 128 equal lanes); D alone is set without
    a decay."""
    C = tiling.C
    lower_CC, _ = _masks(C)
    if g_1C is None:
        return jnp.where(lower_CC, 1.0, 0.0), None, None, None
    sums = _sums(tiling, jnp.where(lower_CC, g_1C, 0.0), constants[0][...])
    D_CC = jnp.where(lower_CC, jnp.exp(sums[:, :C]), 0.0)
    through = jnp.exp(sums[:, C:])
    return D_CC, through, D_CC[C - 1 : C], through[C - 1 : C]


def _sums(tiling, x_CC, zeros_and_ones):
    """A product with zeros and ones (twice below each other, where x is two terms side by side)."""
    x = jnp.concatenate(terms(tiling.narrow, x_CC), axis=1)
    return dot(tiling.narrow, x, zeros_and_ones)


def forward(tiling, constants, q_CK, k_CK, s_CC, v_CV, g_1C, S_KV):
    """The chunk's output and the state behind it, float32."""
    narrow = tiling.narrow
    D_CC, through, after_1C, total = _decays(tiling, constants, g_1C)
    A_CC = s_CC * (D_CC * tiling.scale)
    q_in_CK = q_CK.astype(jnp.float32) * tiling.scale
    k_out_KC = k_CK.T
    if g_1C is not None:
        q_in_CK = q_in_CK * wide(through, tiling.K)
        k_out_KC = k_out_KC.astype(jnp.float32) * after_1C
        kept_KV = S_KV * wide(total, tiling.V)
    else:
        kept_KV = S_KV
    o_CV = _two_products(tiling, A_CC, v_CV, q_in_CK, S_KV)
    return o_CV, kept_KV + dot(narrow, k_out_KC, v_CV)


def _two_products(tiling, x, y, u, w):
    """x y + u w, as one product with a longer sum where that is free."""
    narrow = tiling.narrow
    if x.shape[1] % LANES or u.shape[1] % LANES:
        return dot(narrow, x, y) + dot(narrow, u, w)
    left = jnp.concatenate([operand(narrow, x), operand(narrow, u)], axis=1)
    right = jnp.concatenate([operand(narrow, y), operand(narrow, w)], axis=0)
    return dot(narrow, left, right)


def backward(tiling, constants, q_CK, k_CK, s_CC, v_CV, g_1C, S_KV, d_o_CV, d_S_KV):
    """The chunk's gradients, from the cotangents of its output and of the state behind it."""
    narrow, C, K = tiling.narrow, tiling.C, tiling.K
    D_CC, through, _, total = _decays(tiling, constants, g_1C)
    D_CC = D_CC * tiling.scale
    A_CC = s_CC * D_CC
    d_s_CC = dot(narrow, d_o_CV, v_CV, (1, 1)) * D_CC
    q_in_CK = q_CK.astype(jnp.float32) * tiling.scale
    d_q_in_CK = dot(narrow, d_o_CV, S_KV, (1, 1)) * tiling.scale
    d_k_out_CK = dot(narrow, v_CV, d_S_KV, (1, 1))
    d_v_out_CV = dot(narrow, k_CK, d_S_KV)
    if g_1C is not None:
        lower_CC, strict_CC = _masks(C)
        behind = jnp.where(lower_CC, 0.0, g_1C)
        ones = constants[0][:, C:]
        after = jnp.exp(_sums(tiling, behind, ones))
        q_in_CK = q_in_CK * wide(through, K)
        d_q_in_CK = d_q_in_CK * wide(through, K)
        d_k_out_CK = d_k_out_CK * wide(after, K)
        d_v_out_CV = d_v_out_CV * wide(after, tiling.V)
    d_v_CV = dot(narrow, A_CC, d_o_CV, (0, 0)) + d_v_out_CV
    d_q_CK = dot(narrow, d_s_CC, k_CK) + d_q_in_CK
    d_k_CK = dot(narrow, d_s_CC, q_CK, (0, 0)) + d_k_out_CK
    d_entering_KV = dot(narrow, q_in_CK, d_o_CV, (0, 0))
    if g_1C is None:
        return Gradients(d_q_CK, d_k_CK, d_v_CV, None, d_S_KV + d_entering_KV)
    P_CC = jnp.where(strict_CC, d_s_CC * s_CC, 0.0)
    c_CK = q_CK.astype(jnp.float32) * d_q_in_CK
    e_CK = k_CK.astype(jnp.float32) * d_k_out_CK
    across_CC = sum(
        _two_products(tiling, P, constants[1][:C], c, constants[1][C:])
        for P, c in zip(terms(narrow, P_CC), terms(narrow, c_CK))
    )
    leaving_CC = fine(narrow, e_CK, constants[1][C:])
    kept_KV = d_S_KV * wide(total, tiling.V)
    whole_11 = jnp.sum(
        jnp.sum(kept_KV * S_KV.astype(jnp.float32), axis=0, keepdims=True), axis=1, keepdims=True
    )
    d_g_1C = jnp.sum(jnp.where(lower_CC, across_CC, leaving_CC), axis=0, keepdims=True) + whole_11
    return Gradients(d_q_CK, d_k_CK, d_v_CV, d_g_1C, kept_KV + d_entering_KV)
