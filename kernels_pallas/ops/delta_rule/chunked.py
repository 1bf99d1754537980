"""The delta rule and the general diagonal-plus-low-rank recurrence, chunk by chunk, in plain XLA.

Inside a chunk of C tokens the vectors u_i that the erasing part writes depend on each other through
a strictly lower triangular matrix, so one triangular solve (the WY or UT form: DeltaNet, arXiv
2406.06484, section 3.2; with decay, Gated DeltaNet, arXiv 2412.06464, section 3.3; per channel,
Kimi Linear, arXiv 2510.26692, section 3) makes each chunk an affine map of the state that enters
it. With sums of log decay from the chunk's start (through: with token i, before: without it),
behind token j to the chunk's end (after), and between j and i (D, inside the products):

    delta rule   (I + A) U = beta v - (beta k exp(through)) S     A_ij = beta_i (k_i . D_ij k_j),  j
      < i
    general      (I - A) U = A' V + (b exp(before)) S             A_ij = b_i . D_i-1,j a_j,  A'_ij =
      b_i . D_i-1,j k_j
    output       o = (q exp(through)) S + (q . D w) U [+ (q . D k) V]          w = k (delta rule), a
      (general)
    next state   S' = exp(total) S + (w exp(after))^T U [+ (k exp(after))^T V]

`Chunks` holds these maps, whichever of the two they came from; one pass over the chunks, forward
and backward, serves both. A document's first token is a reset (`decay_sums.RESET`; and its b reads
nothing). Without a decay and without documents nothing is multiplied by exponentials that are 1.

The sequence is cut into spans of chunks. A scan goes over the spans; the chunks of a span are
treated at once but for the state, which goes from one to the next. The backward pass keeps the
inputs and each chunk's entering state, recomputes the maps of one span at a time, and takes the
derivative of the pass by hand, of the maps by `jax.vjp`. Chunks of 32: longer ones take more
products and lose accuracy where beta is 2, shorter ones store more states.

In float32, rounding is held down further where tokens' transitions come near reflections and little
is forgotten: see `reflections`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import (
    branches,
    chunk_blocks,
    decay,
    dtypes,
    matmul,
    remat,
    segments,
    triangular_inverse,
)
from kernels_pallas.common.matmul import scaled
from kernels_pallas.ops.delta_rule import compensated

CHUNK = 32
ACCELERATOR_PAIRS = 64  # chunks times heads treated at once


class Chunks(NamedTuple):
    """Chunks as affine maps of the state S_KV that enters: (chunks M, B, H, ...).

    (I + A_CC) U = write_CV + read_CK S
    o = local_CV + q_CK S + scores_CC U
    S' = decay_K1 S + w_CK^T U + local_KV

    decay_K1: None where nothing decays.
    lost_CC: what A_CC has lost to rounding, where that counts (see `reflections`); it has no
      gradient.
    """

    A_CC: jax.Array
    read_CK: jax.Array
    write_CV: jax.Array
    q_CK: jax.Array
    scores_CC: jax.Array
    w_CK: jax.Array
    decay_K1: jax.Array | None
    lost_CC: jax.Array | None = None
    local_CV: jax.Array | None = None
    local_KV: jax.Array | None = None


def run(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    beta_BTH,
    log_decay_BTHK,
    initial_state_BHKV,
    segment_ids_BT,
    chunk_size=None,
    scale=1.0,
):
    """The delta rule in chunks. Arguments are normalised by `api.py`; the scale of q is a number."""
    log_decay_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, initial_state_BHKV.dtype)
    reflects = None
    if initial_state_BHKV.dtype == jnp.float32:
        squared_BTH = _repeat_heads(compensated.squared(k_BTGK), v_BTHV.shape[2])
        sizes_BTH = dtypes.multiply(jnp.abs(beta_BTH), squared_BTH)
        reflects = compensated.needed(sizes_BTH, log_decay_BTHK)
    inputs = (q_BTGK, k_BTGK, v_BTHV, beta_BTH[..., None], log_decay_BTHK)
    form = _form(_delta_rule_chunks, q_BTGK.shape[-1], v_BTHV, chunk_size, scale)
    return _run(form, inputs, initial_state_BHKV, reflects)


def run_diagonal_plus_low_rank(
    q_BTHK,
    k_BTHK,
    v_BTHV,
    a_BTHK,
    b_BTHK,
    log_decay_BTHK,
    initial_state_BHKV,
    segment_ids_BT,
    chunk_size=None,
):
    """The general transition in chunks. Arguments are normalised by `api.py`."""
    if segment_ids_BT is not None:
        b_BTHK = jnp.where(segments.starts(segment_ids_BT)[:, :, None, None], 0.0, b_BTHK)
    log_decay_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, initial_state_BHKV.dtype)
    reflects = None
    if initial_state_BHKV.dtype == jnp.float32:
        squared_BTH = compensated.squared(a_BTHK) * compensated.squared(b_BTHK)
        reflects = compensated.needed(jnp.sqrt(squared_BTH), log_decay_BTHK)
    inputs = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK)
    form = _form(_diagonal_plus_low_rank_chunks, q_BTHK.shape[-1], v_BTHV, chunk_size, 1.0)
    return _run(form, inputs, initial_state_BHKV, reflects)


class _Form(NamedTuple):
    """What is fixed at tracing. C: chunk length, a power of two. M: chunks a span."""

    chunks: Callable[..., Chunks]  # of a span's inputs, each (M, B, heads, C, dim)
    scale: float
    C: int
    M: int


def _form(chunks, K, v_BTHV, chunk_size, scale) -> _Form:
    B, T, H, V = v_BTHV.shape
    C = chunk_blocks.chunk_length(CHUNK if chunk_size is None else chunk_size, T)
    M = chunk_blocks.chunks_per_block(
        -(-T // C), B * H, max(K, V), accelerator_pairs=ACCELERATOR_PAIRS
    )
    return _Form(chunks, scale, C, M)


def _delta_rule_chunks(q_MBGCK, k_MBGCK, v_MBHCV, beta_MBHC1, log_decay_MBHCK, *, exact) -> Chunks:
    H = v_MBHCV.shape[2]
    sums = _decay_sums(log_decay_MBHCK)
    products = _decayed_products(sums, H)
    q_MBHCK, k_MBHCK = (_repeat_heads(x, H) for x in (q_MBGCK, k_MBGCK))
    return Chunks(
        A_CC=scaled(jnp.tril(products(k_MBGCK, k_MBGCK), -1), beta_MBHC1),
        read_CK=_decayed(scaled(k_MBHCK, -beta_MBHC1), sums.g_cumsum_CK),
        write_CV=scaled(v_MBHCV, beta_MBHC1),
        q_CK=_decayed(q_MBHCK, sums.g_cumsum_CK),
        scores_CC=products(q_MBGCK, k_MBGCK),
        w_CK=_decayed(k_MBHCK, sums.g_reversed_CK),
        decay_K1=_state_decay(sums),
        lost_CC=beta_MBHC1 * _lost(k_MBHCK, k_MBHCK, sums, exclusive=False) if exact else None,
    )


def _diagonal_plus_low_rank_chunks(
    q_MBHCK, k_MBHCK, v_MBHCV, a_MBHCK, b_MBHCK, log_decay_MBHCK, *, exact
) -> Chunks:
    H = v_MBHCV.shape[2]
    sums = _decay_sums(log_decay_MBHCK)
    products = _decayed_products(sums, H)
    products_exclusive = _decayed_products(sums, H, exclusive=True)
    return Chunks(
        A_CC=-products_exclusive(b_MBHCK, a_MBHCK),
        read_CK=_decayed(b_MBHCK, sums.g_exclusive_CK),
        write_CV=jnp.einsum("MBHij,MBHjV->MBHiV", products_exclusive(b_MBHCK, k_MBHCK), v_MBHCV),
        q_CK=_decayed(q_MBHCK, sums.g_cumsum_CK),
        scores_CC=products(q_MBHCK, a_MBHCK),
        w_CK=_decayed(a_MBHCK, sums.g_reversed_CK),
        decay_K1=_state_decay(sums),
        lost_CC=-_lost(b_MBHCK, a_MBHCK, sums, exclusive=True) if exact else None,
        local_CV=jnp.einsum("MBHij,MBHjV->MBHiV", products(q_MBHCK, k_MBHCK), v_MBHCV),
        local_KV=jnp.einsum("MBHCK,MBHCV->MBHKV", _decayed(k_MBHCK, sums.g_reversed_CK), v_MBHCV),
    )


def _decay_sums(log_decay_MBHCK):
    """Its sums; None: each of them None, which decays nothing."""
    if log_decay_MBHCK is None:
        return decay.Sums(*(None for _ in decay.Sums._fields))
    return decay.chunk_sums(log_decay_MBHCK, levels=log_decay_MBHCK.shape[-1] > 1)


def _decayed(x_MBHCK, log_decay_MBHCK):
    return x_MBHCK if log_decay_MBHCK is None else scaled(x_MBHCK, jnp.exp(log_decay_MBHCK))


def _state_decay(sums):
    return None if sums.g_total_K is None else jnp.exp(sums.g_total_K)[..., None]


def _decayed_products(sums, H, *, exclusive=False):
    """A function of rows and columns: sum_K row_iK column_jK exp(g_{j+1} + ... + g_i)_K, zero for j
    > i.

    With `before` the sum of decays stops in front of i, and the diagonal is zero. Where all
    channels decay alike, heads that share rows and columns share their products.
    """
    if _per_channel(sums):

        def per_channel(rows_MBGCK, columns_MBGCK):
            rows_MBHCK, columns_MBHCK = (_repeat_heads(x, H) for x in (rows_MBGCK, columns_MBGCK))
            return decay.decayed_scores(rows_MBHCK, columns_MBHCK, sums, exclusive=exclusive)

        return per_channel
    D_MBHCC = _pair_decay(sums, exclusive)

    def per_head(rows_MBGCK, columns_MBGCK):
        scores_MBGCC = jnp.einsum("MBGiK,MBGjK->MBGij", rows_MBGCK, columns_MBGCK)
        scores_MBHCC = _repeat_heads(scores_MBGCC, H)
        if D_MBHCC is None:
            return jnp.tril(scores_MBHCC, -1 if exclusive else 0)
        return scores_MBHCC * D_MBHCC

    return per_head


def _per_channel(sums):
    return sums.g_total_K is not None and sums.g_total_K.shape[-1] > 1


def _pair_decay(sums, exclusive):
    if sums.log_decay_CK is None:
        return None
    return decay.pair_decay(sums.log_decay_CK, exclusive=exclusive)


def _lost(rows_MBHCK, columns_MBHCK, sums, *, exclusive):
    """What a chunk's A has lost to rounding. It has no gradient."""
    rows_MBHCK, columns_MBHCK, sums = jax.lax.stop_gradient((rows_MBHCK, columns_MBHCK, sums))
    if _per_channel(sums):
        lost_MBHCC = decay.decayed_scores(
            *(rows_MBHCK, columns_MBHCK, sums),
            exclusive=exclusive,
            rectangle=compensated.lost_rectangle,
        )
    else:
        lost_MBHCC = compensated.lost_product(rows_MBHCK, columns_MBHCK)
    if sums.log_decay_CK is not None and not _per_channel(sums):
        scores_MBHCC = jnp.einsum("MBHiK,MBHjK->MBHij", rows_MBHCK, columns_MBHCK)
        between_MBHCC = decay.sums_between(sums.log_decay_CK[..., 0], exclusive)
        D_MBHCC = _pair_decay(sums, exclusive)
        lost_MBHCC = compensated.lost_decayed(scores_MBHCC, lost_MBHCC, D_MBHCC, between_MBHCC)
    return jnp.tril(lost_MBHCC, -1)


def _repeat_heads(x_MBGCK, H):
    G = x_MBGCK.shape[2]
    return x_MBGCK if G == H else jnp.repeat(x_MBGCK, H // G, axis=2)


def _pass(chunks: Chunks, S_BHKV):
    """Through the chunks of a span: their outputs, the state that leaves and those that entered
    each."""
    state_dot = compensated.state_product(chunks.lost_CC)

    def one_chunk(S_BHKV, inputs):
        c, X_BHCC = inputs
        R_BHCV = c.write_CV + state_dot("BHCK,BHKV->BHCV", c.read_CK, S_BHKV)
        U_BHCV = compensated.solve(c.A_CC, c.lost_CC, X_BHCC, R_BHCV)
        S_kept = S_BHKV if c.decay_K1 is None else c.decay_K1 * S_BHKV
        S_next = S_kept + state_dot("BHCK,BHCV->BHKV", c.w_CK, U_BHCV)
        if c.local_KV is not None:
            S_next = S_next + c.local_KV
        return S_next, (S_BHKV, U_BHCV)

    X_MBHCC = triangular_inverse.inverse(chunks.A_CC)
    S_BHKV, (S_MBHKV, U_MBHCV) = jax.lax.scan(one_chunk, S_BHKV, (chunks, X_MBHCC))
    o_MBHCV = jnp.einsum("MBHCK,MBHKV->MBHCV", chunks.q_CK, S_MBHKV)
    o_MBHCV = o_MBHCV + jnp.einsum("MBHij,MBHjV->MBHiV", chunks.scores_CC, U_MBHCV)
    if chunks.local_CV is not None:
        o_MBHCV = o_MBHCV + chunks.local_CV
    return o_MBHCV, S_BHKV, S_MBHKV


def _pass_backward(c: Chunks, S_MBHKV, do_MBHCV, dS_BHKV):
    """Cotangents of the maps and of the state that entered the span."""
    state_dot = compensated.state_product(c.lost_CC)
    X_MBHCC = triangular_inverse.inverse(c.A_CC)
    R_MBHCV = c.write_CV + state_dot("MBHCK,MBHKV->MBHCV", c.read_CK, S_MBHKV)
    U_MBHCV = compensated.solve(c.A_CC, c.lost_CC, X_MBHCC, R_MBHCV)
    dU_MBHCV = jnp.einsum("MBHij,MBHiV->MBHjV", c.scores_CC, do_MBHCV)
    dS_MBHKV = jnp.einsum("MBHCK,MBHCV->MBHKV", c.q_CK, do_MBHCV)

    def one_chunk(dS_next, inputs):
        c, X_BHCC, dU_BHCV, dS_BHKV = inputs
        dU_BHCV = dU_BHCV + state_dot("BHCK,BHKV->BHCV", c.w_CK, dS_next)
        dR_BHCV = compensated.solve_transposed(c.A_CC, c.lost_CC, X_BHCC, dU_BHCV)
        dS_kept = dS_next if c.decay_K1 is None else c.decay_K1 * dS_next
        dS_BHKV = dS_BHKV + dS_kept + state_dot("BHCK,BHCV->BHKV", c.read_CK, dR_BHCV)
        return dS_BHKV, (dS_next, dR_BHCV)

    dS_BHKV, (dS_next_MBHKV, dR_MBHCV) = jax.lax.scan(
        one_chunk, dS_BHKV, (c, X_MBHCC, dU_MBHCV, dS_MBHKV), reverse=True
    )
    ddecay_MBHK1 = None
    if c.decay_K1 is not None:
        shared = [axis for axis in (2, 3) if c.decay_K1.shape[axis] == 1]
        ddecay_MBHK1 = jnp.sum(matmul.sum_last(dS_next_MBHKV * S_MBHKV), axis=shared, keepdims=True)
    dchunks = Chunks(
        A_CC=-compensated.precise("MBHiV,MBHjV->MBHij", dR_MBHCV, U_MBHCV),
        read_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", dR_MBHCV, S_MBHKV),
        write_CV=dR_MBHCV,
        q_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", do_MBHCV, S_MBHKV),
        scores_CC=jnp.einsum("MBHiV,MBHjV->MBHij", do_MBHCV, U_MBHCV),
        w_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", U_MBHCV, dS_next_MBHKV),
        decay_K1=ddecay_MBHK1,
        lost_CC=None if c.lost_CC is None else jnp.zeros_like(c.lost_CC),
        local_CV=None if c.local_CV is None else do_MBHCV,
        local_KV=None if c.local_KV is None else dS_next_MBHKV,
    )
    return dchunks, dS_BHKV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(form: _Form, inputs, S_BHKV, reflects):
    """inputs: (B, T, heads, dim), q the first and v the third. reflects: see `reflections.occur`."""
    return _run_forward(form, inputs, S_BHKV, reflects)[0]


def _run_forward(form, inputs, S_BHKV, reflects):
    T, dtype = inputs[2].shape[1], inputs[2].dtype
    L = form.C * form.M
    wholes = _padded(inputs, L)

    def over_spans(exact, wholes, S_BHKV):
        def one_span(carry, n):
            S_BHKV, o_BTHV = carry
            span = _chunks(chunk_blocks.read(wholes, n, L), form, S_BHKV.dtype)
            o_MBHCV, S_BHKV, S_MBHKV = _pass(form.chunks(*span, exact=exact), S_BHKV)
            return (
                S_BHKV,
                chunk_blocks.write(o_BTHV, _tokens(o_MBHCV.astype(dtype)), n, L),
            ), S_MBHKV

        v_BTHV = wholes[2]
        start = S_BHKV, chunk_blocks.buffers_like(v_BTHV)
        return jax.lax.scan(one_span, start, jnp.arange(v_BTHV.shape[1] // L))

    (S_BHKV, o_BTHV), S_NMBHKV = branches.either(reflects, over_spans, wholes, S_BHKV)
    o_BTHV = chunk_blocks.from_buffers(o_BTHV, inputs[2])
    o_BTHV, S_NMBHKV = remat.named((o_BTHV[:, :T], S_NMBHKV))
    return (o_BTHV, S_BHKV), (inputs, S_NMBHKV, reflects)


def _run_backward(form, residuals, cotangents):
    inputs, S_NMBHKV, reflects = residuals
    do_BTHV, dS_BHKV = cotangents
    T, wide = do_BTHV.shape[1], dS_BHKV.dtype
    L = form.C * form.M
    wholes, do_BTHV = _padded((inputs, do_BTHV), L)

    def over_spans(exact, wholes, S_NMBHKV, do_BTHV, dS_BHKV):
        def one_span(carry, at):
            dS_BHKV, dinputs = carry
            n, S_MBHKV = at
            span, do_BLHV = chunk_blocks.read((wholes, do_BTHV), n, L)
            chunks, form_vjp = jax.vjp(
                lambda *span: form.chunks(*_chunks(span, form, wide), exact=exact), *span
            )
            do_MBHCV = _chunk(do_BLHV, form.C, wide)
            dchunks, dS_BHKV = _pass_backward(chunks, S_MBHKV, do_MBHCV, dS_BHKV)
            return (dS_BHKV, chunk_blocks.write(dinputs, form_vjp(dchunks), n, L)), None

        start = dS_BHKV, chunk_blocks.buffers_like(wholes)
        numbered = jnp.arange(S_NMBHKV.shape[0]), S_NMBHKV
        return jax.lax.scan(one_span, start, numbered, reverse=True)[0]

    dS_BHKV, dinputs = branches.either(reflects, over_spans, wholes, S_NMBHKV, do_BTHV, dS_BHKV)
    dinputs = chunk_blocks.from_buffers(dinputs, inputs)
    return jax.tree.map(lambda dx: dx[:, :T], dinputs), dS_BHKV, None


_run.defvjp(_run_forward, _run_backward)


def _padded(arrays, L):
    """(B, T, H, K) to a multiple of L tokens, by some that neither decay nor write."""
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, chunk_blocks.padding(x.shape[1], L)), (0, 0), (0, 0))),
        arrays,
    )


def _chunks(span, form, dtype):
    """A span's inputs in chunks, the first of them, q, scaled."""
    q_MBGCK, *others = (x if x is None else _chunk(x, form.C, dtype) for x in span)
    return q_MBGCK * form.scale, *others


def _chunk(x_BLHK, C, dtype):
    """(B, L, H, K) to (M, B, H, C, K) in float32 or wider, which is what everything in a chunk is
    computed in.

    U is a long alternating sum where beta is near 2; with bfloat16 operands it loses all but a
    digit.
    """
    B, _, H, K = x_BLHK.shape
    return x_BLHK.reshape(B, -1, C, H, K).transpose(1, 0, 3, 2, 4).astype(dtype)


def _tokens(x_MBHCV):
    """(M, B, H, C, V) to (B, L, H, V)."""
    M, B, H, C, V = x_MBHCV.shape
    return x_MBHCV.transpose(1, 0, 3, 2, 4).reshape(B, M * C, H, V)
