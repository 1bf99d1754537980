"""Linear attention in chunks: matrix products inside a chunk, the recurrence only from chunk to
chunk.

With D_ij the decay between tokens j <= i of a chunk, b_i that from the chunk's start to i, r_j that
behind j to the chunk's end (`decay_sums`), and S the state that enters the chunk,

    o_i = sum_{j<=i} D_ij (q_i . k_j) v_j + S^T (b_i q_i)        S_next = diag(b_C) S + sum_j (r_j
      k_j) v_j^T.

This is the chunkwise form of GLA (arXiv 2312.06635, section 4), Lightning Attention-2 (2401.04658,
algorithm 1) and Mamba-2's SSD (2405.21060, section 6). Where the decay is per head, b, r and D
multiply on the side of v and of the scores, so that heads which share q and k share q k^T and
neither q nor k is copied. Documents are masks: a pair counts when no boundary lies between, the
entering state up to the first boundary, the leaving state behind the last one.

The backward pass is our own. The forward pass keeps its inputs and the state at the start of each
span (some chunks); the backward pass walks the spans in reverse and differentiates each,
recomputed, with the states' cotangent carried: memory is O(T K + (T/C) K V). The gradient of the
gates comes from D, b and r themselves, sums of like terms; the known shortcut reverse_cumsum(q dq -
k dk) is a difference of large numbers where the decay is strong.

Spans: the chunks of a span are computed at once, the spans one after the other, each cut from the
inputs and put into the outputs in place. On CPU a span is only as large as stays in cache from one
matrix product to the next (two cores, B 2, H 8, K = V = 64, float32: the whole sequence as one span
takes twice the time), on an accelerator it is the whole sequence.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks, dtypes, matmul, remat, segments
from kernels_pallas.common import decay as decay_sums
from kernels_pallas.dispatch import tuning

CHUNK_SIZE = 64


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """The chunked form. Arguments are normalised by `api.py`; chunk_size is a power of two, at
    least 16, or None."""
    decay = decay_sums.kind(log_decay_BTHK)
    per_channel = decay == "per_channel"
    if per_channel:
        q_BTGK, k_BTGK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    B, T, G, K = q_BTGK.shape
    H, V = v_BTHV.shape[2:]
    R = H // G
    key = ("linear_attention", "chunked", str(v_BTHV.dtype), f"{K}x{V} {decay}")
    C = chunk_size or tuning.lookup({"chunk_size": CHUNK_SIZE}, *key)["chunk_size"]
    C = chunk_blocks.chunk_length(C, T, least=16)
    chunks = -(-T // C)
    M = chunk_blocks.chunks_per_block(chunks, B * H, max(K, V))
    N = -(-chunks // M)
    padding = N * M * C - T

    def padded(x_BTX, width):
        """(B, T, G, width), and zeros behind: neither written to the state nor decaying it."""
        return jnp.pad(x_BTX.reshape(B, T, G, width), ((0, 0), (0, padding), (0, 0), (0, 0)))

    log_decay = None
    if log_decay_BTHK is not None:
        log_decay = padded(log_decay_BTHK, K if per_channel else R)
    runs = None
    if segment_ids_BT is not None:
        run_BT = segments.run_index(segment_ids_BT)
        run_BT = jnp.pad(run_BT, ((0, 0), (0, padding)), mode="edge")
        runs = run_BT, jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0)))  # and of the token before each
    inputs = padded(q_BTGK, K), padded(k_BTGK, K), padded(v_BTHV, R * V), log_decay
    state_BGRKV = initial_state_BHKV.reshape(B, G, R, K, V)
    state_BGKW = jnp.moveaxis(state_BGRKV, 2, 3).reshape(B, G, K, R * V)

    form = _Form(C, M * C, R, per_channel, scale)
    o_BTGW, final_BGKW = _over_spans(form, inputs, state_BGKW, runs)

    final_BGRKV = jnp.moveaxis(final_BGKW.reshape(B, G, K, R, V), 3, 2)
    return o_BTGW.reshape(B, T + padding, H, V)[:, :T], final_BGRKV.reshape(B, H, K, V)


class _Form(NamedTuple):
    """What is fixed at tracing: chunk and span length, heads in a group, where the decay stands,
    the output's scale."""

    C: int
    L: int
    R: int
    per_channel: bool
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_spans(form, inputs, state_BGKW, runs):
    return _forward(form, inputs, state_BGKW, runs)[0]


def _forward(form, inputs, state_BGKW, runs):
    def body(carry, n):
        state_BGKW, o_BTGW = carry
        o_BLGW, next_BGKW = _span(form, state_BGKW, *chunk_blocks.read((inputs, runs), n, form.L))
        return (next_BGKW, chunk_blocks.write(o_BTGW, o_BLGW, n, form.L)), state_BGKW

    v_BTGW = inputs[2]
    N = v_BTGW.shape[1] // form.L
    start = state_BGKW, chunk_blocks.buffers_like(v_BTGW)
    (final_BGKW, o_BTGW), state_NBGKW = jax.lax.scan(body, start, jnp.arange(N))
    o_BTGW, state_NBGKW = remat.named((chunk_blocks.from_buffers(o_BTGW, v_BTGW), state_NBGKW))
    return (o_BTGW, final_BGKW), (inputs, state_NBGKW, runs)


def _backward(form, saved, cotangents):
    inputs, state_NBGKW, runs = saved
    d_o_BTGW, d_final_BGKW = cotangents

    def body(carry, at):
        d_state_BGKW, d_inputs = carry
        n, state_BGKW = at
        span, runs_BL, d_o_BLGW = chunk_blocks.read((inputs, runs, d_o_BTGW), n, form.L)
        _, vjp = jax.vjp(lambda state, span: _span(form, state, span, runs_BL), state_BGKW, span)
        d_state_BGKW, d_span = vjp((d_o_BLGW, d_state_BGKW))
        return (d_state_BGKW, chunk_blocks.write(d_inputs, d_span, n, form.L)), None

    start = d_final_BGKW, chunk_blocks.buffers_like(inputs)
    numbered = jnp.arange(state_NBGKW.shape[0]), state_NBGKW
    (d_state_BGKW, d_inputs), _ = jax.lax.scan(body, start, numbered, reverse=True)
    return chunk_blocks.from_buffers(d_inputs, inputs), d_state_BGKW, None


_over_spans.defvjp(_forward, _backward)


def _span(form, state_BGKW, inputs, runs):
    """One span of arrays (B, L, G, ...): its output, and the state behind it."""
    B, L, G, W = inputs[2].shape
    M, C, E = L // form.C, form.C, B * G

    def by_chunk(x_BLGX):
        x_BMCGX = x_BLGX.reshape(B, M, C, G, -1)
        return x_BMCGX.transpose(1, 0, 3, 2, 4).reshape(M, E, C, -1)

    if runs is not None:
        run_MEC, before_MEC = (
            by_chunk(jnp.broadcast_to(x[:, :, None, None], (B, L, G, 1)))[..., 0] for x in runs
        )
        runs = run_MEC, before_MEC[..., 0]
    o_MECW, state_EKW = _chunks(
        form, state_BGKW.reshape(E, -1, W), jax.tree.map(by_chunk, inputs), runs
    )
    o_BLGW = o_MECW.reshape(M, B, G, C, W).transpose(1, 0, 3, 2, 4).reshape(B, L, G, W)
    return o_BLGW, state_EKW.reshape(state_BGKW.shape)


def _chunks(form, state_EKW, inputs, runs):
    """M chunks: their outputs, and the state behind the last. E rows (batch and group); W is R
    heads of V each.

    log_decay is None, (M, E, C, R) for one decay per head, or (M, E, C, K) for one per channel,
    with R = 1.
    runs: the number of each token's document, and of the one whose state enters the chunk, or None.
    """
    R = form.R
    q_MECK, k_MECK, v_MECW, log_decay_MECX = inputs
    M, E, C, W = v_MECW.shape
    pairs_MECC, enters_MEC, leaves_MEC, stays_ME = _masks(runs)

    def over_values(x_R):
        """One number a head to one a value: (..., R) to (..., W)."""
        return jnp.repeat(x_R, W // x_R.shape[-1], axis=-1)

    through = after = total = None
    if log_decay_MECX is not None:
        sums = decay_sums.chunk_sums(log_decay_MECX, levels=form.per_channel)
        through, after, total = map(jnp.exp, (sums.g_cumsum_CK, sums.g_reversed_CK, sums.g_total_K))
    through = _masked(enters_MEC, through)
    after = _masked(leaves_MEC, after)
    total = _masked(stays_ME, total)

    if form.per_channel:
        scores_MERCC = decay_sums.decayed_scores(q_MECK, k_MECK, sums)[:, :, None]
    else:
        scores_MERCC = matmul.einsum("MEiK,MEjK->MEij", q_MECK, k_MECK)[:, :, None]
        if log_decay_MECX is None:
            lower_CC = jnp.tril(jnp.ones((C, C), bool))[None, None, None]
            scores_MERCC = jnp.where(lower_CC, scores_MERCC, 0.0)
        else:
            log_decay_MERC1 = jnp.moveaxis(log_decay_MECX, 3, 2)[..., None]
            scores_MERCC = scores_MERCC * decay_sums.pair_decay(log_decay_MERC1)
    q_in_MECK, k_out_MECK, v_out_MECW, keep_MEKW = q_MECK, k_MECK, v_MECW, None
    if total is not None and R == 1:
        q_in_MECK, k_out_MECK = matmul.scaled(q_MECK, through), matmul.scaled(k_MECK, after)
        keep_MEKW = total[..., None]
    elif total is not None:
        v_out_MECW = dtypes.multiply(v_MECW, over_values(after))
        keep_MEKW = over_values(total)[:, :, None]
    if pairs_MECC is not None:
        scores_MERCC = jnp.where(pairs_MECC[:, :, None], scores_MERCC, 0.0)

    written_MEKW = matmul.einsum("MEjK,MEjW->MEKW", k_out_MECK, v_out_MECW)
    state_MEKW, final_EKW = _through_chunks(state_EKW, keep_MEKW, written_MEKW)
    o_MECW = matmul.einsum("MEiK,MEKW->MEiW", q_in_MECK, state_MEKW)
    if total is not None and R > 1:
        o_MECW = o_MECW * over_values(through)
    if scores_MERCC.shape[2] == 1:
        o_MECW = o_MECW + matmul.einsum("MEij,MEjW->MEiW", scores_MERCC[:, :, 0], v_MECW)
    else:
        v_MECRV = v_MECW.reshape(M, E, C, R, W // R)
        o_MERCV = matmul.einsum("MERij,MERjV->MERiV", scores_MERCC, jnp.moveaxis(v_MECRV, 3, 2))
        o_MECW = o_MECW + jnp.moveaxis(o_MERCV, 2, 3).reshape(M, E, C, W)
    return (form.scale * o_MECW).astype(v_MECW.dtype), final_EKW


def _through_chunks(state_EKW, keep_MEKW, written_MEKW):
    """The recurrence over a span's chunks: the state at the start of each, and behind the last."""

    def body(state_EKW, chunk):
        keep_EKW, written_EKW = chunk
        kept_EKW = state_EKW if keep_EKW is None else matmul.scaled(state_EKW, keep_EKW)
        return kept_EKW + written_EKW, state_EKW

    final_EKW, state_MEKW = jax.lax.scan(body, state_EKW, (keep_MEKW, written_MEKW))
    return state_MEKW, final_EKW


def _masks(runs):
    """Who may touch whom: pairs of one document; tokens of the entering document, of the leaving
    one; both the same."""
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
