"""Softmax attention in blocks, in O(T) memory, with its own backward pass.

The equations stand in docs/math/softmax_attention.md. For every block of C queries the blocks of E
keys it can see are visited in turn, with running maximum m, sum l and output o (the online softmax
of arXiv 1805.02867, in blocks as in FlashAttention, 2205.14135). Blocks that no query sees are not
visited, so that a window costs O(T * window): where tokens are masked by index, the blocks' own
indices tell which these are, else the ranges of positions and documents in them. The backward pass
saves q, k, v, o (unrounded: ds is a difference) and log_sum, and makes the probabilities of each
block again (2307.08691, section 3.1). `context_parallel.ring_attention` uses the same steps.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import chunk_blocks, dtypes, kernel_vjp, matmul

BLOCK_SIZE = 128


def run(q_BTHK, k_BSGK, v_BSGV, visibility, scale):
    """Computes attention in blocks of queries and keys; arguments as for `reference.naive`."""
    T, S, G = q_BTHK.shape[1], *v_BSGV.shape[1:3]
    C, E = block_sizes(T, S)
    k_BGSK, v_BGSV = (keys_first(z, E) for z in (k_BSGK, v_BSGV))
    visibility = visibility.padded(chunk_blocks.padding(T, C), chunk_blocks.padding(S, E))
    q_BGRTK = queries_first(q_BTHK, G, C)
    o_BGRTV = _attend((scale, (C, E)), visibility, q_BGRTK, k_BGSK, v_BGSV)
    return time_first(o_BGRTV, T).astype(q_BTHK.dtype)


def block_sizes(T: int, S: int) -> tuple[int, int]:
    """Returns (C, E), the queries and the keys of a block, for T queries and S keys."""
    C, E = (min(BLOCK_SIZE, x) if chunk_blocks.known(x) else BLOCK_SIZE for x in (T, S))
    return C, E


def queries_first(q_BTHK, G, C):
    """Reshapes (B, T, H, K) to (B, G, R, T, K), R = H/G, with T zero-padded to blocks of C."""
    B, T, H, K = q_BTHK.shape
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    return jnp.pad(q_BGRTK, ((0, 0), (0, 0), (0, 0), (0, chunk_blocks.padding(T, C)), (0, 0)))


def keys_first(z_BSGX, E):
    """Reshapes (B, S, G, X) to (B, G, S, X), with S zero-padded to blocks of E."""
    S = z_BSGX.shape[1]
    return jnp.pad(z_BSGX.swapaxes(1, 2), ((0, 0), (0, 0), (0, chunk_blocks.padding(S, E)), (0, 0)))


def time_first(o_BGRTV, T):
    """Reshapes (B, G, R, T, V) to (B, T, H, V), H = G R, without the padding after T tokens."""
    B, G, R, _, V = o_BGRTV.shape
    return o_BGRTV[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, V)


def _key_blocks(i, count, visibility, C):
    """Returns the range (first, last + 1) of the `count` key blocks that query block i can see."""
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
    """Computes an einsum of x and y, both cast to `dtype`, with sums in float32 or wider."""
    accumulate = dtypes.common(dtype, jnp.float32)
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=accumulate
    )


def _logits(q_BGRCK, k_BGEK, visibility, i, j, scale, sizes):
    """Computes the logits s = scale q k^T of query block i and key block j, -inf where not seen."""
    C, E = sizes
    logits_BGRCE = scale * _product("bgrck,bgek->bgrce", q_BGRCK, k_BGEK, q_BGRCK.dtype)
    seen_BCE = visibility.block(i * C, C, j * E, E).mask()
    return jnp.where(seen_BCE[:, None, None], logits_BGRCE, -jnp.inf)


def initial(q_BGRTK, v_BGSV):
    """Returns (m, l, o) of every query before any key: maximum -inf, sum 0 and output 0."""
    accumulate = dtypes.common(q_BGRTK.dtype, jnp.float32)
    l_BGRT = jnp.zeros_like(q_BGRTK[..., 0], accumulate)
    o_BGRTV = jnp.zeros_like(q_BGRTK, accumulate, (*l_BGRT.shape, v_BGSV.shape[3]))
    return jnp.full_like(l_BGRT, -jnp.inf), l_BGRT, o_BGRTV


def update(running, q_BGRTK, k_BGSK, v_BGSV, visibility, scale, sizes):
    """Returns the online softmax's (m, l, o), updated from `running` by these keys and values."""
    C, E = sizes
    count = k_BGSK.shape[2] // E
    seen_NM = visibility.blocks_seen(C, E)

    def query_block(_, block):
        i, running = block
        q_BGRCK = _cut(q_BGRTK, i, C)

        def key_block(j, running):
            m_BGRC, l_BGRC, o_BGRCV = running
            logits_BGRCE = _logits(q_BGRCK, _cut(k_BGSK, j, E), visibility, i, j, scale, sizes)
            # m' = max(m, s), p = exp(s - m')
            new_m_BGRC = jnp.maximum(m_BGRC, jnp.max(logits_BGRCE, axis=-1))
            shift_BGRC = jnp.where(new_m_BGRC == -jnp.inf, 0, new_m_BGRC)  # nothing seen so far
            p_BGRCE = jnp.exp(logits_BGRCE - shift_BGRC[..., None])
            # l' = exp(m - m') l + sum p, o' = exp(m - m') o + p v
            keep_BGRC = jnp.exp(m_BGRC - shift_BGRC)
            added_BGRCV = _product("bgrce,bgev->bgrcv", p_BGRCE, _cut(v_BGSV, j, E), v_BGSV.dtype)
            l_BGRC = l_BGRC * keep_BGRC + matmul.sum_last(p_BGRCE)[..., 0]
            return new_m_BGRC, l_BGRC, o_BGRCV * keep_BGRC[..., None] + added_BGRCV

        first, last = _key_blocks(i, count, visibility, C)
        return None, lax.fori_loop(first, last, _where_seen(seen_NM, i, key_block), running)

    def by_block(z):  # the time axis -> blocks first
        z = z.reshape(*z.shape[:3], -1, C, *z.shape[4:])
        return jnp.moveaxis(z, 3, 0)

    def joined(z):
        z = jnp.moveaxis(z, 0, 3)
        return z.reshape(*z.shape[:3], -1, *z.shape[5:])

    blocks = jnp.arange(q_BGRTK.shape[3] // C), jax.tree.map(by_block, running)
    return jax.tree.map(joined, lax.scan(query_block, None, blocks)[1])


def normalized(running):
    """Returns o / l and log_sum = m + log l, from (m, l, o); 0 for a query that sees no key."""
    m_BGRT, l_BGRT, o_BGRTV = running
    some_BGRT = l_BGRT > 0
    total_BGRT = jnp.where(some_BGRT, l_BGRT, 1)
    log_sum_BGRT = jnp.where(some_BGRT, m_BGRT + jnp.log(total_BGRT), 0)
    return o_BGRTV / total_BGRT[..., None], log_sum_BGRT


def update_backward(dq_BGRTK, saved, k_BGSK, v_BGSV, visibility, scale, sizes):
    """Returns dq with the contribution of these keys added, and the keys' dk and dv.

    saved: q, the cotangent g of o, each query's log_sum over all its keys, and sum_V g o. Results
      are float32 or wider.
    """
    q_BGRTK, g_BGRTV, log_sum_BGRT, drop_BGRT = saved
    C, E = sizes
    count = k_BGSK.shape[2] // E
    dtype = q_BGRTK.dtype
    seen_NM = visibility.blocks_seen(C, E)

    def query_block(carry, i):
        *carry, dq_BGRTK = carry
        q_BGRCK, g_BGRCV = _cut(q_BGRTK, i, C), _cut(g_BGRTV, i, C)
        log_sum_BGRC1 = _cut(log_sum_BGRT[..., None], i, C)
        drop_BGRC1 = _cut(drop_BGRT[..., None], i, C)

        def key_block(j, carry):
            dk_BGSK, dv_BGSV, dq_BGRCK = carry
            # p = exp(s - log_sum), dv = p^T g
            k_BGEK = _cut(k_BGSK, j, E)
            logits_BGRCE = _logits(q_BGRCK, k_BGEK, visibility, i, j, scale, sizes)
            p_BGRCE = jnp.exp(logits_BGRCE - log_sum_BGRC1)
            dv_BGEV = _product("bgrce,bgrcv->bgev", p_BGRCE, g_BGRCV, dtype)
            # ds = p (g v^T - sum_V g o), dk = scale ds^T q, dq += scale ds k
            dp_BGRCE = _product("bgrcv,bgev->bgrce", g_BGRCV, _cut(v_BGSV, j, E), dtype)
            ds_BGRCE = scale * p_BGRCE * (dp_BGRCE - drop_BGRC1)
            dk_BGEK = _product("bgrce,bgrck->bgek", ds_BGRCE, q_BGRCK, dtype)
            dq_BGRCK = dq_BGRCK + _product("bgrce,bgek->bgrck", ds_BGRCE, k_BGEK, dtype)
            return _add(dk_BGSK, dk_BGEK, j, E), _add(dv_BGSV, dv_BGEV, j, E), dq_BGRCK

        first, last = _key_blocks(i, count, visibility, C)
        carry = (*carry, _cut(dq_BGRTK, i, C))
        *carry, dq_BGRCK = lax.fori_loop(first, last, _where_seen(seen_NM, i, key_block), carry)
        dq_BGRTK = lax.dynamic_update_slice_in_dim(dq_BGRTK, dq_BGRCK, i * C, axis=3)
        return (*carry, dq_BGRTK), None

    zeros = (jnp.zeros_like(z, dq_BGRTK.dtype) for z in (k_BGSK, v_BGSV))
    start = (*zeros, dq_BGRTK)
    (dk_BGSK, dv_BGSV, dq_BGRTK), _ = lax.scan(
        query_block, start, jnp.arange(q_BGRTK.shape[3] // C)
    )
    return dq_BGRTK, dk_BGSK, dv_BGSV


def _where_seen(seen_NM, i, key_block):
    """Wraps key_block(j, carry) to do nothing where query block i sees no key of block j."""
    if seen_NM is None:
        return key_block
    return lambda j, carry: lax.cond(seen_NM[i, j], key_block, lambda j, carry: carry, j, carry)


def _forward(form, visibility, q_BGRTK, k_BGSK, v_BGSV):
    running = initial(q_BGRTK, v_BGSV)
    o_BGRTV, log_sum_BGRT = normalized(update(running, q_BGRTK, k_BGSK, v_BGSV, visibility, *form))
    return o_BGRTV, (o_BGRTV, log_sum_BGRT)


def _backward(form, visibility, arrays, residuals, g_BGRTV):
    (q_BGRTK, k_BGSK, v_BGSV), (o_BGRTV, log_sum_BGRT) = arrays, residuals
    dtype = q_BGRTK.dtype
    dq_BGRTK = jnp.zeros_like(q_BGRTK, dtypes.common(dtype, jnp.float32))
    saved = q_BGRTK, g_BGRTV, log_sum_BGRT, matmul.sum_last(g_BGRTV * o_BGRTV)[..., 0]
    gradients = update_backward(dq_BGRTK, saved, k_BGSK, v_BGSV, visibility, *form)
    return tuple(z.astype(dtype) for z in gradients)


def plain(form, visibility, q_BGRTK, k_BGSK, v_BGSV):
    """Computes attention by blocks of queries in operations that JAX itself can differentiate."""
    scale, (C, _) = form
    T, S = q_BGRTK.shape[3], k_BGSK.shape[2]

    @jax.checkpoint
    def query_block(i):
        q_BGRCK = _cut(q_BGRTK, i, C)
        logits_BGRCS = _logits(q_BGRCK, k_BGSK, visibility, i, 0, scale, (C, S))
        m_BGRC1 = lax.stop_gradient(jnp.max(logits_BGRCS, axis=-1, keepdims=True))
        p_BGRCS = jnp.exp(logits_BGRCS - jnp.where(m_BGRC1 == -jnp.inf, 0, m_BGRC1))
        l_BGRC1 = jnp.sum(p_BGRCS, axis=-1, keepdims=True)
        o_BGRCV = _product("bgrcs,bgsv->bgrcv", p_BGRCS, v_BGSV, p_BGRCS.dtype)
        return o_BGRCV / jnp.where(l_BGRC1 > 0, l_BGRC1, 1)

    o_NBGRCV = lax.map(query_block, jnp.arange(T // C))
    return jnp.moveaxis(o_NBGRCV, 0, 3).reshape(*q_BGRTK.shape[:4], -1)


_attend = kernel_vjp.differentiable(_forward, _backward, plain)
