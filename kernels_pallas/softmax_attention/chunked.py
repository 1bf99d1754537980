"""Softmax attention in blocks, in memory that grows with T and not with T * T, with its own backward pass.

For every block of C queries the blocks of C keys it can see are visited in turn; running maximum m, sum l and output o
are corrected as m grows (the online softmax of arXiv 1805.02867, in blocks as in FlashAttention, arXiv 2205.14135).
Blocks that causality or the window rules out are not visited, so a window costs O(T * window). The backward pass keeps
q, k, v, o (unrounded: dS is a difference) and the log of each row's sum, and makes the probabilities of each block again (arXiv 2307.08691, section
3.1):

    P = exp(s - log_sum)    dS = P * (g v^T - rowsum(g * o))    dv += P^T g    dq += dS k    dk += dS^T q
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_SIZE = 128


def chunked(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Same contract as `reference.naive`."""
    B, T, H, K = q_BTHK.shape
    S, G, V = v_BSGV.shape[1:]
    C, E = min(BLOCK_SIZE, T), min(BLOCK_SIZE, S)
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    q_BGRTK = jnp.pad(q_BGRTK, ((0, 0), (0, 0), (0, 0), (0, -T % C), (0, 0)))
    k_BGSK, v_BGSV = (
        jnp.pad(z.swapaxes(1, 2), ((0, 0), (0, 0), (0, -S % E), (0, 0))) for z in (k_BSGK, v_BSGV)
    )
    visibility = visibility.padded(-T % C, -S % E)
    o_BGRTV = _attend(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, (C, E))[:, :, :, :T]
    return o_BGRTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, V).astype(q_BTHK.dtype)


def _key_blocks(i, count, visibility, C):
    """The first key block that query block i can see, and the one after the last."""
    first, last = 0, count
    if visibility.aligned and visibility.causal:
        last = i + 1
    if visibility.aligned and visibility.window is not None:
        reach = visibility.window - 1
        first = jnp.maximum(0, (i * C - reach) // C)
        last = jnp.minimum(last, ((i + 1) * C - 1 + reach) // C + 1)
    return first, last


def _cut(z, i, size):
    return lax.dynamic_slice_in_dim(z, i * size, size, axis=z.ndim - 2)


def _add(z, block, i, size):
    return lax.dynamic_update_slice_in_dim(z, _cut(z, i, size) + block, i * size, axis=z.ndim - 2)


def _product(subscripts, x, y, dtype):
    """Operands in the input's dtype, sums in float32 or wider."""
    accumulate = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=accumulate
    )


def _logits(q_BGRCK, k_BGEK, visibility, i, j, scale, sizes):
    """Scaled logits of a block, -inf where they are not seen."""
    C, E = sizes
    logits_BGRCE = scale * _product("bgrck,bgek->bgrce", q_BGRCK, k_BGEK, q_BGRCK.dtype)
    seen_BCE = visibility.block(i * C, C, j * E, E).mask()
    return jnp.where(seen_BCE[:, None, None], logits_BGRCE, -jnp.inf)


def _forward_blocks(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes):
    C, E = sizes
    count = k_BGSK.shape[2] // E
    accumulate = jnp.promote_types(q_BGRTK.dtype, jnp.float32)
    rows = (*q_BGRTK.shape[:3], C)

    def query_block(_, i):
        q_BGRCK = _cut(q_BGRTK, i, C)

        def key_block(j, carry):
            m_BGRC, l_BGRC, o_BGRCV = carry
            logits_BGRCE = _logits(q_BGRCK, _cut(k_BGSK, j, E), visibility, i, j, scale, sizes)
            new_m_BGRC = jnp.maximum(m_BGRC, jnp.max(logits_BGRCE, axis=-1))
            shift_BGRC = jnp.where(new_m_BGRC == -jnp.inf, 0, new_m_BGRC)  # nothing seen so far
            p_BGRCE = jnp.exp(logits_BGRCE - shift_BGRC[..., None])
            keep_BGRC = jnp.exp(m_BGRC - shift_BGRC)
            added_BGRCV = _product("bgrce,bgev->bgrcv", p_BGRCE, _cut(v_BGSV, j, E), v_BGSV.dtype)
            l_BGRC = l_BGRC * keep_BGRC + jnp.sum(p_BGRCE, axis=-1)
            return new_m_BGRC, l_BGRC, o_BGRCV * keep_BGRC[..., None] + added_BGRCV

        empty = (
            jnp.full(rows, -jnp.inf, accumulate),
            jnp.zeros(rows, accumulate),
            jnp.zeros((*rows, v_BGSV.shape[3]), accumulate),
        )
        first, last = _key_blocks(i, count, visibility, C)
        m_BGRC, l_BGRC, o_BGRCV = lax.fori_loop(first, last, key_block, empty)
        some_BGRC = l_BGRC > 0
        total_BGRC = jnp.where(some_BGRC, l_BGRC, 1)
        log_sum_BGRC = jnp.where(some_BGRC, m_BGRC + jnp.log(total_BGRC), 0)
        return None, (o_BGRCV / total_BGRC[..., None], log_sum_BGRC)

    def joined(z):  # blocks first -> the time axis
        z = jnp.moveaxis(z, 0, 3)
        return z.reshape(*z.shape[:3], -1, *z.shape[5:])

    _, blocks = lax.scan(query_block, None, jnp.arange(q_BGRTK.shape[3] // C))
    return jax.tree.map(joined, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes):
    return _forward_blocks(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes)[0]


def _forward(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes):
    o_BGRTV, log_sum_BGRT = _forward_blocks(q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes)
    return o_BGRTV, (q_BGRTK, k_BGSK, v_BGSV, visibility, o_BGRTV, log_sum_BGRT)


def _backward(scale, sizes, saved, g_BGRTV):
    q_BGRTK, k_BGSK, v_BGSV, visibility, o_BGRTV, log_sum_BGRT = saved
    C, E = sizes
    count = k_BGSK.shape[2] // E
    dtype = q_BGRTK.dtype
    accumulate = jnp.promote_types(dtype, jnp.float32)
    drop_BGRT = jnp.sum(g_BGRTV * o_BGRTV, axis=-1)

    def query_block(carry, i):
        q_BGRCK, g_BGRCV = _cut(q_BGRTK, i, C), _cut(g_BGRTV, i, C)
        log_sum_BGRC1 = _cut(log_sum_BGRT[..., None], i, C)
        drop_BGRC1 = _cut(drop_BGRT[..., None], i, C)

        def key_block(j, carry):
            dk_BGSK, dv_BGSV, dq_BGRCK = carry
            k_BGEK = _cut(k_BGSK, j, E)
            logits_BGRCE = _logits(q_BGRCK, k_BGEK, visibility, i, j, scale, sizes)
            p_BGRCE = jnp.exp(logits_BGRCE - log_sum_BGRC1)
            dv_BGEV = _product("bgrce,bgrcv->bgev", p_BGRCE, g_BGRCV, dtype)
            dp_BGRCE = _product("bgrcv,bgev->bgrce", g_BGRCV, _cut(v_BGSV, j, E), dtype)
            ds_BGRCE = scale * p_BGRCE * (dp_BGRCE - drop_BGRC1)
            dk_BGEK = _product("bgrce,bgrck->bgek", ds_BGRCE, q_BGRCK, dtype)
            dq_BGRCK = dq_BGRCK + _product("bgrce,bgek->bgrck", ds_BGRCE, k_BGEK, dtype)
            return _add(dk_BGSK, dk_BGEK, j, E), _add(dv_BGSV, dv_BGEV, j, E), dq_BGRCK

        first, last = _key_blocks(i, count, visibility, C)
        nothing_BGRCK = jnp.zeros(q_BGRCK.shape, accumulate)
        *carry, dq_BGRCK = lax.fori_loop(first, last, key_block, (*carry, nothing_BGRCK))
        return tuple(carry), dq_BGRCK

    zeros = tuple(jnp.zeros(z.shape, accumulate) for z in (k_BGSK, v_BGSV))
    (dk_BGSK, dv_BGSV), dq_NBGRCK = lax.scan(query_block, zeros, jnp.arange(q_BGRTK.shape[3] // C))
    dq_BGRTK = jnp.moveaxis(dq_NBGRCK, 0, 3).reshape(q_BGRTK.shape)
    return dq_BGRTK.astype(dtype), dk_BGSK.astype(dtype), dv_BGSV.astype(dtype), None


_attend.defvjp(_forward, _backward)
