"""Linear attention in chunks: products inside a chunk, the recurrence only between chunks.

The equations, forward and backward, stand in docs/math/linear_attention.md under the names used
here. This is the chunkwise form of GLA (arXiv 2312.06635, section 4), Lightning Attention-2
(2401.04658, algorithm 1) and Mamba-2's SSD (2405.21060, section 6). Where the decay is per head or
per token, exp_g_cumsum, exp_g_reversed and D multiply on the side of v and of A, so that heads
which share q and k share q k^T, and neither q nor k is copied. Documents are masks: a pair counts
where no boundary lies between, the entering state up to the first boundary, the leaving state
after the last one.

The backward pass is our own. The forward pass saves its inputs and the state that enters each
block of chunks; the backward pass walks the blocks in reverse and differentiates each, recomputed,
with the cotangent of the state carried. Memory is O(T K + (T/C) K V).

The chunks of a block are computed at once, the blocks one after the other. On CPU a block is only
as large as stays in cache from one product to the next, on an accelerator the whole sequence.

Letters: M chunks of a block, L its tokens, E rows (batch and group), R heads of a group, W = R V.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks, decay, dtypes, matmul, remat, segments
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.dispatch import tuning

CHUNK_SIZE = 64


def run(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, scale
):
    """Computes linear attention in chunks from normalised arguments; returns (o, final state)."""
    decay_kind = decay.kind(log_decay_BTHK)
    per_channel = decay_kind == "per_channel"
    if per_channel:
        q_BTGK, k_BTGK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    B, T, G, K = q_BTGK.shape
    H, V = v_BTHV.shape[2:]
    R = H // G
    key = ("linear_attention", "chunked", str(v_BTHV.dtype), f"{K}x{V} {decay_kind}")
    C = chunk_size or tuning.lookup({"chunk_size": CHUNK_SIZE}, *key)["chunk_size"]
    C = chunk_blocks.chunk_length(C, T, least=16)
    chunks = -(-T // C)
    M = chunk_blocks.chunks_per_block(chunks, B * H, max(K, V))
    N = -(-chunks // M)
    padding = N * M * C - T

    def padded(x_BTX, width):
        """Reshapes to (B, T, G, width) and pads T with zeros, which neither write nor decay."""
        return jnp.pad(x_BTX.reshape(B, T, G, width), ((0, 0), (0, padding), (0, 0), (0, 0)))

    log_decay = None
    if log_decay_BTHK is not None:
        log_decay = padded(log_decay_BTHK, K if per_channel else R)
    runs = None
    if segment_ids_BT is not None:
        run_BT = segments.run_index(segment_ids_BT)
        run_BT = jnp.pad(run_BT, ((0, 0), (0, padding)), mode="edge")
        runs = (
            run_BT,
            jnp.pad(run_BT[:, :-1], ((0, 0), (1, 0))),
        )  # of each token, and of the one before
    inputs = padded(q_BTGK, K), padded(k_BTGK, K), padded(v_BTHV, R * V), log_decay
    state_BGRKV = initial_state_BHKV.reshape(B, G, R, K, V)
    state_BGKW = jnp.moveaxis(state_BGRKV, 2, 3).reshape(B, G, K, R * V)

    form = _Form(C, M * C, R, per_channel, scale)
    o_BTGW, final_BGKW = _run(form, inputs, state_BGKW, runs)

    final_BGRKV = jnp.moveaxis(final_BGKW.reshape(B, G, K, R, V), 3, 2)
    return o_BTGW.reshape(B, T + padding, H, V)[:, :T], final_BGRKV.reshape(B, H, K, V)


class _Form(NamedTuple):
    """Static options of `_run`.

    C, L: tokens of a chunk and of a block. R: value heads per key head. per_channel: whether each
      key channel has its decay. scale: multiplies the output.
    """

    C: int
    L: int
    R: int
    per_channel: bool
    scale: float


@custom_vjp(0)
def _run(form, inputs, state_BGKW, runs):
    """Computes all blocks in turn; returns (o_BTGW, the final state).

    inputs: q, k, v and the log decay or None, each (B, T, G, ...). runs: the documents (B, T) of
      each token and of the token before it, or None.
    """
    return _forward(form, inputs, state_BGKW, runs)[0]


def _forward(form, inputs, state_BGKW, runs):
    def block(state_BGKW, _, cut):
        o_BLGW, next_BGKW = _block(form, state_BGKW, *cut)
        return o_BLGW, next_BGKW, state_BGKW

    v_BTGW = inputs[2]
    o_BTGW, final_BGKW, state_NBGKW = chunk_blocks.scan(
        block, state_BGKW, (inputs, runs), v_BTGW, form.L
    )
    o_BTGW, state_NBGKW = remat.named((o_BTGW, state_NBGKW))
    return (o_BTGW, final_BGKW), (inputs, state_NBGKW, runs)


def _backward(form, saved, cotangents):
    inputs, state_NBGKW, runs = saved
    d_o_BTGW, d_final_BGKW = cotangents

    def block(d_state_BGKW, state_BGKW, cut):
        inputs, runs_BL, d_o_BLGW = cut
        _, vjp = jax.vjp(lambda state, x: _block(form, state, x, runs_BL), state_BGKW, inputs)
        d_state_BGKW, d_inputs = vjp((d_o_BLGW, d_state_BGKW))
        return d_inputs, d_state_BGKW, None

    cut = inputs, runs, d_o_BTGW
    d_inputs, d_state_BGKW, _ = chunk_blocks.scan(
        block, d_final_BGKW, cut, inputs, form.L, per_block=state_NBGKW, reverse=True
    )
    return d_inputs, d_state_BGKW, None


_run.defvjp(_forward, _backward)


def _block(form, state_BGKW, inputs, runs):
    """Returns the output (B, L, G, ...) of a block of chunks, and the state that leaves it."""
    B, L, G, W = inputs[2].shape
    M, C, E = L // form.C, form.C, B * G

    def by_chunk(x_BLGX):
        return chunk_blocks.to_chunks(x_BLGX, C).reshape(M, E, C, -1)

    if runs is not None:
        run_MEC, before_MEC = (
            by_chunk(jnp.broadcast_to(x[:, :, None, None], (B, L, G, 1)))[..., 0] for x in runs
        )
        runs = run_MEC, before_MEC[..., 0]
    o_MECW, state_EKW = _chunks(
        form, state_BGKW.reshape(E, -1, W), jax.tree.map(by_chunk, inputs), runs
    )
    o_BLGW = chunk_blocks.from_chunks(o_MECW.reshape(M, B, G, C, W))
    return o_BLGW, state_EKW.reshape(state_BGKW.shape)


def _chunks(form, state_EKW, inputs, runs):
    """Computes M chunks at once: returns outputs (M, E, C, W) and the state after the last chunk.

    Args:
      form: the sizes, the kind of decay and the scale.
      state_EKW: the state that enters the first chunk.
      inputs: q, k (M, E, C, K), v (M, E, C, W), and the log decay: None, (M, E, C, R) for a number
        per head or token, or (M, E, C, K) per channel, where R is 1.
      runs: each token's document (M, E, C) and that of the entering state (M, E), or None.
    """
    R = form.R
    q_MECK, k_MECK, v_MECW, log_decay_MECX = inputs
    M, E, C, W = v_MECW.shape
    pairs_MECC, enters_MEC, leaves_MEC, stays_ME = _masks(runs)

    def over_values(x_R):
        """Repeats the number of each head for all of the head's values: (..., R) to (..., W)."""
        return jnp.repeat(x_R, W // x_R.shape[-1], axis=-1)

    # exp(g_cumsum), exp(g_reversed) and exp(g_total), 0 where a document begins between
    exp_g_cumsum: Any = None
    exp_g_reversed: Any = None
    exp_g_total: Any = None
    if log_decay_MECX is not None:
        sums = decay.chunk_sums(log_decay_MECX, levels=form.per_channel)
        exp_g_cumsum, exp_g_reversed, exp_g_total = map(
            jnp.exp, (sums.g_cumsum_CK, sums.g_reversed_CK, sums.g_total_K)
        )
    exp_g_cumsum = _masked(enters_MEC, exp_g_cumsum)
    exp_g_reversed = _masked(leaves_MEC, exp_g_reversed)
    exp_g_total = _masked(stays_ME, exp_g_total)

    # A_ij = q_i^T diag(D_ij) k_j for j <= i; with a decay per head or token, (q k^T) * D
    if form.per_channel:
        A_MERCC = decay.decayed_scores(q_MECK, k_MECK, sums)[:, :, None]
    else:
        A_MERCC = matmul.einsum("MEiK,MEjK->MEij", q_MECK, k_MECK)[:, :, None]
        if log_decay_MECX is None:
            lower_CC = jnp.tril(jnp.ones((C, C), bool))[None, None, None]
            A_MERCC = jnp.where(lower_CC, A_MERCC, 0.0)
        else:
            log_decay_MERC1 = jnp.moveaxis(log_decay_MECX, 3, 2)[..., None]
            A_MERCC = A_MERCC * decay.pair_decay(log_decay_MERC1)
    if pairs_MECC is not None:
        A_MERCC = jnp.where(pairs_MECC[:, :, None], A_MERCC, 0.0)

    # q exp(g_cumsum) and k exp(g_reversed), or the decays on the side of o and v, heads sharing k
    q_in_MECK, k_out_MECK, v_out_MECW, exp_g_total_MEKW = q_MECK, k_MECK, v_MECW, None
    if exp_g_total is not None and R == 1:
        q_in_MECK = matmul.scaled(q_MECK, exp_g_cumsum)
        k_out_MECK = matmul.scaled(k_MECK, exp_g_reversed)
        exp_g_total_MEKW = exp_g_total[..., None]
    elif exp_g_total is not None:
        v_out_MECW = dtypes.multiply(v_MECW, over_values(exp_g_reversed))
        exp_g_total_MEKW = over_values(exp_g_total)[:, :, None]

    # S' = diag(exp(g_total)) S + (k exp(g_reversed))^T v, from chunk to chunk
    local_MEKW = matmul.einsum("MEjK,MEjW->MEKW", k_out_MECK, v_out_MECW)
    state_MEKW, final_EKW = _entering_states(state_EKW, exp_g_total_MEKW, local_MEKW)

    # o = scale ((q exp(g_cumsum)) S + A v)
    o_MECW = matmul.einsum("MEiK,MEKW->MEiW", q_in_MECK, state_MEKW)
    if exp_g_total is not None and R > 1:
        o_MECW = o_MECW * over_values(exp_g_cumsum)
    if A_MERCC.shape[2] == 1:
        o_MECW = o_MECW + matmul.einsum("MEij,MEjW->MEiW", A_MERCC[:, :, 0], v_MECW)
    else:
        v_MECRV = v_MECW.reshape(M, E, C, R, W // R)
        o_MERCV = matmul.einsum("MERij,MERjV->MERiV", A_MERCC, jnp.moveaxis(v_MECRV, 3, 2))
        o_MECW = o_MECW + jnp.moveaxis(o_MERCV, 2, 3).reshape(M, E, C, W)
    return (form.scale * o_MECW).astype(v_MECW.dtype), final_EKW


def _entering_states(state_EKW, exp_g_total_MEKW, local_MEKW):
    """Returns each chunk's entering state, and the final state, by S' = exp(g_total) S + local."""

    def body(state_EKW, chunk):
        exp_g_total_EKW, local_EKW = chunk
        decayed_EKW = state_EKW
        if exp_g_total_EKW is not None:
            decayed_EKW = matmul.scaled(state_EKW, exp_g_total_EKW)
        return decayed_EKW + local_EKW, state_EKW

    final_EKW, state_MEKW = jax.lax.scan(body, state_EKW, (exp_g_total_MEKW, local_MEKW))
    return state_MEKW, final_EKW


def _masks(runs):
    """Returns masks of packed documents, or Nones: (pairs, enters, leaves, stays).

    They hold for pairs of tokens in one document, tokens that see the entering state, tokens that
    reach the leaving state, and chunks whose entering state reaches it.
    """
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


def _masked(mask, decay_X):
    """Returns decay_X (one axis more than the mask; None is 1), but 0 where the mask is False."""
    if mask is None:
        return decay_X
    return jnp.where(mask[..., None], 1.0 if decay_X is None else decay_X, 0.0)
