"""Linear attention in chunks: matrix products inside a chunk, the recurrence only from chunk to chunk.

With D_ij the decay between tokens j <= i of a chunk, b_i that from the chunk's start to i, r_j that behind j to the
chunk's end (`decay_sums`), and S the state that enters the chunk,

    o_i = sum_{j<=i} D_ij (q_i . k_j) v_j + S^T (b_i q_i)        S_next = diag(b_C) S + sum_j (r_j k_j) v_j^T.

This is the chunkwise form of GLA (arXiv 2312.06635, section 4), Lightning Attention-2 (2401.04658, algorithm 1) and
Mamba-2's SSD (2405.21060, section 6). Where the decay is per head, b, r and D multiply on the side of v and of the
scores, so that heads which share q and k share q k^T and neither q nor k is copied. Documents are masks: a pair counts
when no boundary lies between, the entering state up to the first boundary, the leaving state behind the last one.

The backward pass is our own. The forward pass keeps its inputs and the state at the start of each span (some chunks);
the backward pass walks the spans in reverse and differentiates each, recomputed, with the states' cotangent carried:
memory is O(T K + (T/C) K V). The gradient of the gates comes from D, b and r themselves, sums of like terms; the known
shortcut reverse_cumsum(q dq - k dk) is a difference of large numbers where the decay is strong.

Spans: the chunks of a span are computed at once, the spans one after the other. On CPU a span is only as large as
keeps the cores busy, so that what one matrix product writes is still in cache for the next (measured at B 2, H 8, K = V
= 64: the whole sequence as one span is 2 to 4 times slower). On an accelerator the span is the whole sequence.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import decay_sums, matmul, segments
from kernels_pallas import recurrence_arguments as arguments

CHUNK_SIZE = 64
CPU_MATRICES = 32  # on CPU: how many (chunk, head) pairs make a span


def chunked(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """The chunked form. Arguments are normalised by `api.py`; chunk_size is a power of two, at least 16, or None."""
    per_channel = log_decay_BTHK is not None and log_decay_BTHK.shape[-1] > 1
    if per_channel:
        q_BTGK, k_BTGK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    B, T, G, K = q_BTGK.shape
    H, V = v_BTHV.shape[2:]
    E, R = B * G, H // G
    C = min(chunk_size or CHUNK_SIZE, max(16, 1 << (T - 1).bit_length()))
    chunks = -(-T // C)
    span = chunks
    if jax.default_backend() == "cpu":
        span = min(chunks, -(-CPU_MATRICES // (B * H)))
    N = -(-chunks // span)
    M = -(-chunks // N)
    padding = N * M * C - T

    def spans(x_BTX, width):
        """(B, T, ...) to (N, M, E, C, width), padded with zeros: neither written to the state nor decaying it."""
        x_BTGX = x_BTX.reshape(B, T, G, width)
        x_BTGX = jnp.pad(x_BTGX, ((0, 0), (0, padding), (0, 0), (0, 0)))
        x_NMBGCX = x_BTGX.reshape(B, N, M, C, G, width).transpose(1, 2, 0, 4, 3, 5)
        return x_NMBGCX.reshape(N, M, E, C, width)

    log_decay = None
    if log_decay_BTHK is not None:
        log_decay = spans(log_decay_BTHK, K if per_channel else R)
    runs = None
    if segment_ids_BT is not None:
        runs = _runs(segment_ids_BT, padding, G, (N, M, E, C))
    state_BGRKV = initial_state_BHKV.reshape(B, G, R, K, V)
    state_EKW = jnp.moveaxis(state_BGRKV, 2, 3).reshape(E, K, R * V)
    inputs = spans(q_BTGK, K), spans(k_BTGK, K), spans(v_BTHV, R * V), log_decay

    o_NMECW, final_EKW = _over_spans(R, per_channel, scale, inputs, state_EKW, runs)

    o_BNMCGW = o_NMECW.reshape(N, M, B, G, C, R * V).transpose(2, 0, 1, 4, 3, 5)
    final_BGRKV = jnp.moveaxis(final_EKW.reshape(B, G, K, R, V), 3, 2)
    return o_BNMCGW.reshape(B, T + padding, H, V)[:, :T], final_BGRKV.reshape(B, H, K, V)


def _runs(segment_ids_BT, padding, G, shape_NMEC):
    """The document's number of each token, and that of the state entering each chunk: of the token before it."""
    N, M, E, C = shape_NMEC
    run_BT = jnp.pad(segments.run_index(segment_ids_BT), ((0, 0), (0, padding)), mode="edge")
    run_NMBC = jnp.moveaxis(run_BT.reshape(-1, N, M, C), 0, 2)
    before_BT = jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0)))
    before_NMB = jnp.moveaxis(before_BT.reshape(-1, N, M, C)[..., 0], 0, 2)
    return jnp.repeat(run_NMBC, G, axis=2), jnp.repeat(before_NMB, G, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _over_spans(R, per_channel, scale, inputs, state_EKW, runs):
    def body(state_EKW, span):
        o_MECW, state_EKW = _span(R, per_channel, scale, state_EKW, *span)
        return state_EKW, o_MECW

    final_EKW, o_NMECW = jax.lax.scan(body, state_EKW, (inputs, runs))
    return o_NMECW, final_EKW


def _forward(R, per_channel, scale, inputs, state_EKW, runs):
    def body(state_EKW, span):
        o_MECW, next_EKW = _span(R, per_channel, scale, state_EKW, *span)
        return next_EKW, (o_MECW, state_EKW)

    final_EKW, (o_NMECW, state_NEKW) = jax.lax.scan(body, state_EKW, (inputs, runs))
    return (o_NMECW, final_EKW), (inputs, state_NEKW, runs)


def _backward(R, per_channel, scale, saved, cotangents):
    d_o_NMECW, d_final_EKW = cotangents

    def body(d_state_EKW, span):
        (inputs, state_EKW, runs), d_o_MECW = span

        def forward(state_EKW, inputs):
            return _span(R, per_channel, scale, state_EKW, inputs, runs)

        _, vjp = jax.vjp(forward, state_EKW, inputs)
        return vjp((d_o_MECW, d_state_EKW))

    d_state_EKW, d_inputs = jax.lax.scan(body, d_final_EKW, (saved, d_o_NMECW), reverse=True)
    return d_inputs, d_state_EKW, None


_over_spans.defvjp(_forward, _backward)


def _span(R, per_channel, scale, state_EKW, inputs, runs):
    """M chunks: their outputs, and the state behind the last. E rows (batch and group); W is R heads of V each.

    log_decay is None, (M, E, C, R) for one decay per head, or (M, E, C, K) for one per channel, with R = 1.
    """
    q_MECK, k_MECK, v_MECW, log_decay_MECX = inputs
    M, E, C, W = v_MECW.shape
    pairs_MECC, enters_MEC, leaves_MEC, stays_ME = _masks(runs)

    def over_values(x_R):
        """One number a head to one a value: (..., R) to (..., W)."""
        return None if x_R is None else jnp.repeat(x_R, W // x_R.shape[-1], axis=-1)

    through = after = total = None
    if log_decay_MECX is not None:
        sums = decay_sums.chunk_sums(log_decay_MECX)
        through, after, total = map(jnp.exp, (sums.through_CK, sums.after_CK, sums.total_K))
    through = _masked(enters_MEC, through)
    after = _masked(leaves_MEC, after)
    total = _masked(stays_ME, total)

    if per_channel:
        scores_MERCC = decay_sums.decayed_scores(q_MECK, k_MECK, sums)[:, :, None]
        q_in_MECK, k_out_MECK, v_out_MECW = q_MECK * through, k_MECK * after, v_MECW
        keep_MEKW = total[..., None]
    else:
        scores_MERCC = matmul.einsum("MEiK,MEjK->MEij", q_MECK, k_MECK)[:, :, None]
        if log_decay_MECX is None:
            lower_CC = jnp.tril(jnp.ones((C, C), bool))[None, None, None]
            scores_MERCC = jnp.where(lower_CC, scores_MERCC, 0.0)
        else:
            log_decay_MERC1 = jnp.moveaxis(log_decay_MECX, 3, 2)[..., None]
            scores_MERCC = scores_MERCC * decay_sums.pair_decay(log_decay_MERC1)
        q_in_MECK, k_out_MECK = q_MECK, k_MECK
        v_out_MECW = v_MECW if after is None else v_MECW * over_values(after)
        keep_MEKW = None if total is None else over_values(total)[:, :, None]
    if pairs_MECC is not None:
        scores_MERCC = jnp.where(pairs_MECC[:, :, None], scores_MERCC, 0.0)

    written_MEKW = matmul.einsum("MEjK,MEjW->MEKW", k_out_MECK, v_out_MECW)
    state_MEKW, final_EKW = _through_chunks(state_EKW, keep_MEKW, written_MEKW)
    o_MECW = matmul.einsum("MEiK,MEKW->MEiW", q_in_MECK, state_MEKW)
    if not per_channel and through is not None:
        o_MECW = o_MECW * over_values(through)
    if scores_MERCC.shape[2] == 1:
        o_MECW = o_MECW + matmul.einsum("MEij,MEjW->MEiW", scores_MERCC[:, :, 0], v_MECW)
    else:
        v_MECRV = v_MECW.reshape(M, E, C, R, W // R)
        o_MERCV = matmul.einsum("MERij,MERjV->MERiV", scores_MERCC, jnp.moveaxis(v_MECRV, 3, 2))
        o_MECW = o_MECW + jnp.moveaxis(o_MERCV, 2, 3).reshape(M, E, C, W)
    return (scale * o_MECW).astype(v_MECW.dtype), final_EKW


def _through_chunks(state_EKW, keep_MEKW, written_MEKW):
    """The recurrence over a span's chunks: the state at the start of each, and behind the last."""

    def body(state_EKW, chunk):
        keep_EKW, written_EKW = chunk
        kept_EKW = state_EKW if keep_EKW is None else state_EKW * keep_EKW
        return kept_EKW + written_EKW, state_EKW

    final_EKW, state_MEKW = jax.lax.scan(body, state_EKW, (keep_MEKW, written_MEKW))
    return state_MEKW, final_EKW


def _masks(runs):
    """Who may touch whom: pairs of one document; tokens of the entering document, of the leaving one; both the same."""
    if runs is None:
        return None, None, None, None
    run_MEC, before_ME = runs
    last_ME = run_MEC[..., -1]
    return (
        run_MEC[..., :, None] == run_MEC[..., None, :],
        run_MEC == before_ME[..., None],
        run_MEC == last_ME[..., None],
        before_ME == last_ME,
    )


def _masked(mask, decay):
    """The decay (one more axis than the mask) where the mask holds, else 0; None is 1 everywhere."""
    if mask is None:
        return decay
    return jnp.where(mask[..., None], 1.0 if decay is None else decay, 0.0)
