"""One chunk of linear attention inside a TPU kernel, with one decay per token and head, or none.

The equations are those of docs/math/linear_attention.md. Every exponent is a sum of g itself, by a
product with zeros and ones: that of D_ij is sum_s [s <= i] g_s [s > j], and g_cumsum_i the same
with a column of ones, 128 of them side by side, as a multiplication along the lanes wants it;
exp(g_reversed) is D's last row. bfloat16 inputs keep 16 bits of g in these sums, float32 ones all.
Nothing is subtracted. The gradient of g is a sum over pairs, again products with zeros and ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.tpu.primitives import LANES, lower


class ChunkGradients(NamedTuple):
    """Fields are the gradients of one value head's inputs in a chunk.

    g: of log decay, None if there is none. S: of the state that enters the chunk.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    S: jax.Array


def constants(tiling, backward):
    """Returns the 0/1 matrices whose products with log decay g sum it; () without a decay.

    The first has rows s, and columns [s > j] and LANES of ones, repeated for each bfloat16 term of
    g. The backward pass has a second one: [s > j] by rows j, and K rows of ones below.
    """
    if tiling.decay == "none":
        return ()
    token = jnp.arange(tiling.C)
    behind_SC = (token[:, None] > token[None]).astype(tiling.dtype)
    sums = jnp.concatenate([behind_SC, jnp.ones((tiling.C, LANES), tiling.dtype)], axis=1)
    sums = jnp.concatenate([sums] * (2 if tiling.products.narrow else 1), axis=0)
    if not backward:
        return (sums,)
    ones = jnp.ones((tiling.K, tiling.C), tiling.dtype)
    return sums, jnp.concatenate([behind_SC.T, ones], axis=0)


def _decays(tiling, constants, g_1C):
    """Computes a chunk's decays from its log decay (1, C).

    Returns D (C, C), exp(g_cumsum) (C, 128) with equal lanes, exp(g_reversed) (1, C), and
    exp(g_total) (1, 128). Without a decay only D, and None for the rest.
    """
    C = tiling.C
    lower_CC = lower(C)
    if g_1C is None:
        return jnp.where(lower_CC, 1.0, 0.0), None, None, None
    sums = _sums(tiling, jnp.where(lower_CC, g_1C, 0.0), constants[0][...])
    D_CC = jnp.where(lower_CC, jnp.exp(sums[:, :C]), 0.0)
    exp_g_cumsum = jnp.exp(sums[:, C:])
    return D_CC, exp_g_cumsum, D_CC[C - 1 : C], exp_g_cumsum[C - 1 : C]


def _sums(tiling, x_CC, zeros_and_ones):
    """Multiplies x, as bfloat16 terms side by side, by a 0/1 matrix repeated for each term."""
    x = jnp.concatenate(tiling.products.terms(x_CC), axis=1)
    return tiling.products.rounded(x, zeros_and_ones)


def _lanes(x, width):
    """Widens an array of 128 equal lanes to `width` lanes."""
    copies = -(-width // x.shape[1])
    x = jnp.concatenate([x] * copies, axis=1) if copies > 1 else x
    return x[:, :width]


def forward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g_1C, S_KV):
    """Computes one head's o (C, V) and the state S' (K, V) that leaves the chunk, in float32. S_KV:
    the state that enters the chunk. qk_CC: q k^T. constants: from `constants`."""
    D_CC, exp_g_cumsum, exp_g_reversed_1C, exp_g_total = _decays(tiling, constants, g_1C)
    # A = (q k^T) * D, with the scale; exp(g_cumsum) q reads the entering state.
    A_CC = qk_CC * (D_CC * tiling.scale)
    q_state_CK = q_CK.astype(jnp.float32) * tiling.scale
    k_state_KC, S_next_KV = k_CK.T, S_KV
    if g_1C is not None:
        q_state_CK = q_state_CK * _lanes(exp_g_cumsum, tiling.K)
        k_state_KC = k_state_KC.astype(jnp.float32) * exp_g_reversed_1C
        S_next_KV = S_KV * _lanes(exp_g_total, tiling.V)
    # o = A v + (exp(g_cumsum) q) S
    o_CV = _two_products(tiling, A_CC, v_CV, q_state_CK, S_KV)
    # S' = exp(g_total) S + (exp(g_reversed) k)^T v
    return o_CV, S_next_KV + tiling.products.rounded(k_state_KC, v_CV)


def _two_products(tiling, x, y, u, w):
    """Computes x y + u w, as one product with a longer sum where the shapes allow it."""
    p = tiling.products
    if x.shape[1] % LANES or u.shape[1] % LANES:
        return p.rounded(x, y) + p.rounded(u, w)
    left = jnp.concatenate([*p.terms(x, 1), *p.terms(u, 1)], axis=1)
    right = jnp.concatenate([*p.terms(y, 1), *p.terms(w, 1)], axis=0)
    return p.rounded(left, right)


def backward(tiling, constants, q_CK, k_CK, qk_CC, v_CV, g_1C, S_KV, do_CV, dS_KV):
    """Computes one head's ChunkGradients from do and the cotangent dS' of the state that leaves.
    S_KV: the state that enters the chunk. qk_CC: q k^T. constants: from `constants`."""
    p, C, K = tiling.products, tiling.C, tiling.K
    D_CC, exp_g_cumsum, _, exp_g_total = _decays(tiling, constants, g_1C)
    D_CC = D_CC * tiling.scale
    A_CC = qk_CC * D_CC
    # dA * D, with dA = do v^T
    dqk_CC = p.rounded(do_CV, v_CV, (1, 1)) * D_CC
    # Parts of dq, dk and dv that pass through a state, before its decay.
    q_state_CK = q_CK.astype(jnp.float32) * tiling.scale
    dq_state_CK = p.rounded(do_CV, S_KV, (1, 1)) * tiling.scale
    dk_state_CK = p.rounded(v_CV, dS_KV, (1, 1))
    dv_state_CV = p.rounded(k_CK, dS_KV)
    if g_1C is not None:
        # exp(g_reversed) along the lanes: the sums over tokens after each one.
        lower_CC = lower(C)
        behind = jnp.where(lower_CC, 0.0, g_1C)
        exp_g_reversed = jnp.exp(_sums(tiling, behind, constants[0][:, C:]))
        q_state_CK = q_state_CK * _lanes(exp_g_cumsum, K)
        dq_state_CK = dq_state_CK * _lanes(exp_g_cumsum, K)
        dk_state_CK = dk_state_CK * _lanes(exp_g_reversed, K)
        dv_state_CV = dv_state_CV * _lanes(exp_g_reversed, tiling.V)
    # dv, dq, dk: pairs of the chunk, and what passes through a state.
    dv_CV = p.rounded(A_CC, do_CV, (0, 0)) + dv_state_CV
    dq_CK = p.rounded(dqk_CC, k_CK) + dq_state_CK
    dk_CK = p.rounded(dqk_CC, q_CK, (0, 0)) + dk_state_CK
    # dS = exp(g_total) dS' + (exp(g_cumsum) q)^T do
    dS_entering_KV = p.rounded(q_state_CK, do_CV, (0, 0))
    if g_1C is None:
        return ChunkGradients(dq_CK, dk_CK, dv_CV, None, dS_KV + dS_entering_KV)
    # dg_s: dD * D of pairs j < s <= i, with the entering state as one more j (c_i) and the leaving
    # state as one more i (e_j).
    P_CC = jnp.where(lower(C, strict=True), dqk_CC * qk_CC, 0.0)
    c_CK = q_CK.astype(jnp.float32) * dq_state_CK
    e_CK = k_CK.astype(jnp.float32) * dk_state_CK
    across_CC = sum(
        _two_products(tiling, P, constants[1][:C], c, constants[1][C:])
        for P, c in zip(p.terms(P_CC), p.terms(c_CK))
    )
    leaving_CC = p.dot(e_CK, constants[1][C:])
    # And sum_KV of exp(g_total) dS' * S, which every token of the chunk decays.
    decayed_dS_KV = dS_KV * _lanes(exp_g_total, tiling.V)
    whole_11 = jnp.sum(
        jnp.sum(decayed_dS_KV * S_KV.astype(jnp.float32), axis=0, keepdims=True),
        axis=1,
        keepdims=True,
    )
    dg_1C = jnp.sum(jnp.where(lower_CC, across_CC, leaving_CC), axis=0, keepdims=True) + whole_11
    return ChunkGradients(dq_CK, dk_CK, dv_CV, dg_1C, decayed_dS_KV + dS_entering_KV)
