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
CPU_MATRICES = 64  # on CPU: how many (chunk, head) pairs make a span


def chunked(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size):
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

    def spans(x_BTGX):
        """(B, T, G, ...) -> (N, M, E, C, ...), padded with zeros: neither written to the state nor decaying it."""
        x = jnp.pad(x_BTGX, ((0, 0), (0, padding), *[(0, 0)] * (x_BTGX.ndim - 2)))
        x = jnp.moveaxis(x.reshape(B, N, M, C, G, *x.shape[3:]), (0, 4), (2, 3))
        return x.reshape(N, M, E, C, *x.shape[5:])

    def grouped(x_BTHX):
        return x_BTHX.reshape(B, T, G, R, *x_BTHX.shape[3:])

    log_decay = None
    if log_decay_BTHK is not None:
        log_decay = spans(grouped(log_decay_BTHK if per_channel else log_decay_BTHK[..., 0]))
    runs = None
    if segment_ids_BT is not None:
        runs = _runs(segment_ids_BT, padding, G, (N, M, E, C))
    state_BGRKV = initial_state_BHKV.reshape(B, G, R, K, V)
    state_EKRV = jnp.moveaxis(state_BGRKV, 2, 3).reshape(E, K, R, V)
    inputs = spans(q_BTGK), spans(k_BTGK), spans(grouped(v_BTHV)), log_decay

    o_NMECRV, final_EKRV = _over_spans(inputs, state_EKRV, runs)

    o = jnp.moveaxis(o_NMECRV.reshape(N, M, B, G, C, R, V), (2, 3), (0, 4))
    final_BGRKV = jnp.moveaxis(final_EKRV.reshape(B, G, K, R, V), 3, 2)
    return o.reshape(B, T + padding, H, V)[:, :T], final_BGRKV.reshape(B, H, K, V)


def _runs(segment_ids_BT, padding, G, shape_NMEC):
    """The document's number of each token, and that of the state entering each chunk: of the token before it."""
    N, M, E, C = shape_NMEC
    run_BT = jnp.pad(segments.run_index(segment_ids_BT), ((0, 0), (0, padding)), mode="edge")
    run_NMBC = jnp.moveaxis(run_BT.reshape(-1, N, M, C), 0, 2)
    before_BT = jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0)))
    before_NMB = jnp.moveaxis(before_BT.reshape(-1, N, M, C)[..., 0], 0, 2)
    return jnp.repeat(run_NMBC, G, axis=2), jnp.repeat(before_NMB, G, axis=2)


@jax.custom_vjp
def _over_spans(inputs, state_EKRV, runs):
    def body(state_EKRV, span):
        o_MECRV, state_EKRV = _span(state_EKRV, *span)
        return state_EKRV, o_MECRV

    final_EKRV, o_NMECRV = jax.lax.scan(body, state_EKRV, (inputs, runs))
    return o_NMECRV, final_EKRV


def _forward(inputs, state_EKRV, runs):
    def body(state_EKRV, span):
        o_MECRV, next_EKRV = _span(state_EKRV, *span)
        return next_EKRV, (o_MECRV, state_EKRV)

    final_EKRV, (o_NMECRV, state_NEKRV) = jax.lax.scan(body, state_EKRV, (inputs, runs))
    return (o_NMECRV, final_EKRV), (inputs, state_NEKRV, runs)


def _backward(saved, cotangents):
    d_o_NMECRV, d_final_EKRV = cotangents

    def body(d_state_EKRV, span):
        (inputs, state_EKRV, runs), d_o_MECRV = span
        _, vjp = jax.vjp(lambda state, inputs: _span(state, inputs, runs), state_EKRV, inputs)
        return vjp((d_o_MECRV, d_state_EKRV))

    d_state_EKRV, d_inputs = jax.lax.scan(body, d_final_EKRV, (saved, d_o_NMECRV), reverse=True)
    return d_inputs, d_state_EKRV, None


_over_spans.defvjp(_forward, _backward)


def _span(state_EKRV, inputs, runs):
    """M chunks: their outputs, and the state behind the last. E rows (batch and group), R heads in each.

    log_decay is None, (M, E, C, R) for one decay per head, or (M, E, C, 1, K) with R = 1 for one per channel.
    """
    q_MECK, k_MECK, v_MECRV, log_decay = inputs
    C = q_MECK.shape[2]
    dtype = jnp.result_type(q_MECK, k_MECK, v_MECRV)
    einsum = functools.partial(matmul.einsum, dtype=dtype)
    pairs_MECC, enters_MEC, leaves_MEC, stays_ME = _masks(runs)

    through = after = total = None
    if log_decay is not None:
        per_channel = log_decay.ndim == 5
        log_decay_MERCK = jnp.moveaxis(log_decay if per_channel else log_decay[..., None], 3, 2)
        sums = decay_sums.chunk_sums(log_decay_MERCK)
        through, after = (
            x[:, :, 0] if per_channel else jnp.moveaxis(x[..., 0], 2, 3)
            for x in (jnp.exp(sums.through_CK), jnp.exp(sums.after_CK))
        )
        total = jnp.exp(sums.total_K[:, :, 0] if per_channel else sums.total_K[..., 0])
    through_MECX = _masked(enters_MEC, through)
    after_MECX = _masked(leaves_MEC, after)
    total_MEX = _masked(stays_ME, total)

    if log_decay is not None and per_channel:
        scores_MERCC = decay_sums.decayed_scores(
            q_MECK[:, :, None], k_MECK[:, :, None], sums, dtype=dtype
        )
        q_in_MECK, k_out_MECK, v_out_MECRV = q_MECK * through_MECX, k_MECK * after_MECX, v_MECRV
        keep_MEKR, read_scale_MECR = total_MEX[..., None], None
    else:
        scores_MERCC = einsum("MEiK,MEjK->MEij", q_MECK, k_MECK)[:, :, None]
        if log_decay is None:
            lower_CC = jnp.tril(jnp.ones((C, C), bool))[None, None, None]
            scores_MERCC = jnp.where(lower_CC, scores_MERCC, 0.0)
        else:
            scores_MERCC = scores_MERCC * decay_sums.pair_decay(sums)
        q_in_MECK, k_out_MECK = q_MECK, k_MECK
        v_out_MECRV = v_MECRV if after_MECX is None else v_MECRV * after_MECX[..., None]
        keep_MEKR = None if total_MEX is None else total_MEX[:, :, None]
        read_scale_MECR = through_MECX
    if pairs_MECC is not None:
        scores_MERCC = jnp.where(pairs_MECC[:, :, None], scores_MERCC, 0.0)

    written_MEKRV = einsum("MEjK,MEjRV->MEKRV", k_out_MECK, v_out_MECRV)
    state_MEKRV, final_EKRV = _through_chunks(state_EKRV, keep_MEKR, written_MEKRV)
    o_MECRV = einsum("MEiK,MEKRV->MEiRV", q_in_MECK, state_MEKRV)
    if read_scale_MECR is not None:
        o_MECRV = o_MECRV * read_scale_MECR[..., None]
    o_MERCV = einsum("MERij,MERjV->MERiV", *_per_head(scores_MERCC, jnp.moveaxis(v_MECRV, 3, 2)))
    return (o_MECRV + jnp.moveaxis(o_MERCV, 2, 3)).astype(v_MECRV.dtype), final_EKRV


def _per_head(scores_MERCC, v_MERCV):
    """Without a decay the R heads of a group have the same scores."""
    M, E, R, C, _ = v_MERCV.shape
    return jnp.broadcast_to(scores_MERCC, (M, E, R, C, C)), v_MERCV


def _through_chunks(state_EKRV, keep_MEKR, written_MEKRV):
    """The recurrence over a span's chunks: the state at the start of each, and behind the last."""

    def body(state_EKRV, chunk):
        keep_EKR, written_EKRV = chunk
        kept_EKRV = state_EKRV if keep_EKR is None else state_EKRV * keep_EKR[..., None]
        return kept_EKRV + written_EKRV, state_EKRV

    final_EKRV, state_MEKRV = jax.lax.scan(body, state_EKRV, (keep_MEKR, written_MEKRV))
    return state_MEKRV, final_EKRV


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
