"""Sums over whole documents as matrix products, in O(T) memory.

The equations, forward and backward, stand in docs/math/document_sums.md under the names used here.

A row that is one document has one state (`_whole`): S = sum_s k_s v_s^T, then o_t = S^T q_t. Both
products are cut into pieces of tokens on a CPU, where one that stays in cache is faster, and needs
no transposed copy of the row. With blocks of tokens (`_by_blocks`), block n reads the sum of the
states of blocks 0 to n.

Packed documents (`_by_runs`) are cut into chunks of C tokens. Each token sees a run of tokens to
its left and one to its right: its document and its block, or the other way round. Of a chunk's own
tokens it reads by a masked C x C product, and of the others two states: what enters the chunk from
the left is the sum over the run that crosses its left edge, and so from the right.

The backward pass is the operator itself: dq is the sum for (do, v, k), and dk and dv are those for
(v, do, q) and (k, q, do), with left and right exchanged. So every derivative, of any order, takes
O(T) memory.

Letters: M chunks of a block, L its tokens, E rows (batch and group), W = values of a group's heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks, matmul, remat
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.dispatch import tuning

CHUNK_SIZE = 64


def run(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    initial_state_BHKV,
    segment_ids_BT,
    block_ids_BT,
    block_size,
    chunk_size,
    scale,
    kernel=None,
):
    """Computes sums over documents from normalised arguments; returns (o_BTHV, final_BHKV).

    kernel: what computes `_sums` in place of `_computed`, for packed documents.
    """
    B, T, G, K = q_BTGK.shape
    H, V = v_BTHV.shape[2:]
    # Heads that share a key head are further values of it.
    v_BTGW = v_BTHV.reshape(B, T, G, -1)
    state_BGRKV = initial_state_BHKV.reshape(B, G, H // G, K, V)
    state_BGKW = jnp.moveaxis(state_BGRKV, 2, 3).reshape(B, G, K, -1)
    if block_ids_BT is None and block_size is None:
        o_BTGW, final_BGKW = _whole(q_BTGK, k_BTGK, v_BTGW, state_BGKW, scale)
    elif block_ids_BT is None:
        o_BTGW, final_BGKW = _by_blocks(q_BTGK, k_BTGK, v_BTGW, state_BGKW, block_size, scale)
    else:
        runs = segment_ids_BT, block_ids_BT
        key = ("document_sums", "chunked", str(v_BTHV.dtype), f"{K}x{V}")
        C = chunk_size or tuning.lookup({"chunk_size": CHUNK_SIZE}, *key)["chunk_size"]
        inputs = q_BTGK, k_BTGK, v_BTGW, state_BGKW
        o_BTGW, final_BGKW = _by_runs(inputs, runs, C, scale, kernel)
    final_BGRKV = jnp.moveaxis(final_BGKW.reshape(B, G, K, H // G, V), 3, 2)
    return o_BTGW.reshape(B, T, H, V), final_BGRKV.reshape(B, H, K, V)


def _whole(q_BTGK, k_BTGK, v_BTGW, state_BGKW, scale):
    """Computes the sums of rows that are one document each; returns (o_BTGW, the final state)."""
    B, T, G, K = q_BTGK.shape
    length = None
    if chunk_blocks.known(B, T):
        chunks = -(-T // CHUNK_SIZE)
        widest = max(K, v_BTGW.shape[-1])
        length = CHUNK_SIZE * chunk_blocks.chunks_per_block(chunks, B * G, widest)
        length = None if length >= T else length
    padding = 0 if length is None else -T % length

    def padded(x_BTGX):
        return jnp.pad(x_BTGX, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x_BTGX

    # S = initial state + sum_s k_s v_s^T, o = scale S^T q
    final_BGKW = state_BGKW + _summed(length, padded(k_BTGK), padded(v_BTGW))
    o_BTGW = _read((length, scale, v_BTGW.dtype), padded(q_BTGK), final_BGKW)
    return remat.named((o_BTGW[:, :T] if padding else o_BTGW, final_BGKW))


@custom_vjp(0)
def _summed(length, x_BTGK, y_BTGW):
    """Returns sum_t x_t y_t^T, (B, G, K, W), in pieces of `length` tokens; None is one piece."""
    if length is None:
        return matmul.einsum("BTGK,BTGW->BGKW", x_BTGK, y_BTGW)

    def add(sum_BGKW, n):
        x_BLGK, y_BLGW = chunk_blocks.read((x_BTGK, y_BTGW), n, length)
        return sum_BGKW + matmul.einsum("BLGK,BLGW->BGKW", x_BLGK, y_BLGW), None

    (B, T, G, K), W = x_BTGK.shape, y_BTGW.shape[-1]
    dtype = arguments.state_dtype(x_BTGK, y_BTGW)
    zero_BGKW = jnp.zeros_like(x_BTGK, dtype, (B, G, K, W))
    return jax.lax.scan(add, zero_BGKW, jnp.arange(T // length))[0]


@custom_vjp(0)
def _read(form, x_BTGK, S_BGKW):
    """Returns scale S^T x_t, (B, T, G, W).

    form: length as for `_summed`, scale, and the result's dtype.
    """
    length, scale, dtype = form

    def read(x_BLGK):
        return (scale * matmul.einsum("BLGK,BGKW->BLGW", x_BLGK, S_BGKW)).astype(dtype)

    if length is None:
        return read(x_BTGK)
    like = jnp.zeros_like(x_BTGK, dtype, (*x_BTGK.shape[:3], S_BGKW.shape[-1]))
    o_BTGW, _, _ = chunk_blocks.scan(
        lambda state, _, x_BLGK: (read(x_BLGK), state, None), (), x_BTGK, like, length
    )
    return o_BTGW


def _summed_backward(length, saved, d_BGKW):
    x_BTGK, y_BTGW = saved
    d_x = _read((length, 1.0, x_BTGK.dtype), y_BTGW, jnp.swapaxes(d_BGKW, 2, 3))
    return d_x, _read((length, 1.0, y_BTGW.dtype), x_BTGK, d_BGKW)


def _read_backward(form, saved, d_BTGW):
    (length, scale, _), (x_BTGK, S_BGKW) = form, saved
    d_x = _read((length, scale, x_BTGK.dtype), d_BTGW, jnp.swapaxes(S_BGKW, 2, 3))
    return d_x, (scale * _summed(length, x_BTGK, d_BTGW)).astype(S_BGKW.dtype)


# Each is the other's derivative, so those of every order take no memory beside their results.
_summed.defvjp(lambda length, x, y: (_summed(length, x, y), (x, y)), _summed_backward)
_read.defvjp(lambda form, x, S: (_read(form, x, S), (x, S)), _read_backward)


def _by_blocks(q_BTGK, k_BTGK, v_BTGW, state_BGKW, block_size, scale):
    """Computes the sums of rows that are one document each, in blocks of `block_size` tokens.

    Returns (o_BTGW, the final state), for JAX to differentiate.
    """
    B, T, G, K = q_BTGK.shape

    def blocks(x_BTGX):
        """Reshapes (B, T, G, X) to blocks (B, N, block_size, G, X), zero-padding T as needed."""
        padding = chunk_blocks.padding(T, block_size)
        x_BTGX = jnp.pad(x_BTGX, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return x_BTGX.reshape(B, -1, block_size, G, x_BTGX.shape[-1])

    q_BNCGK, k_BNCGK, v_BNCGW = map(blocks, (q_BTGK, k_BTGK, v_BTGW))
    # S_n = initial state + the sums of blocks 0 to n
    local_NBGKW = matmul.einsum("BNCGK,BNCGW->NBGKW", k_BNCGK, v_BNCGW)

    def add(state_BGKW, local_BGKW):
        state_BGKW = state_BGKW + local_BGKW
        return state_BGKW, state_BGKW

    final_BGKW, state_NBGKW = jax.lax.scan(add, state_BGKW, local_NBGKW)
    # o = scale S_n^T q
    o_BNCGW = scale * matmul.einsum("BNCGK,NBGKW->BNCGW", q_BNCGK, state_NBGKW)
    o_BTGW = o_BNCGW.astype(v_BTGW.dtype).reshape(B, -1, G, v_BTGW.shape[-1])[:, :T]
    return remat.named((o_BTGW, final_BGKW))


class _Form(NamedTuple):
    """Static options of `_sums`.

    C, L: tokens of a chunk and of a block of chunks. scale: multiplies the sums. dtype: that of the
    output. reverse: whether a token sees its block to the left and its document to the right.
    kernel: what computes it, None is `_computed`. name: of the kernel's call.
    """

    C: int
    L: int
    scale: float
    dtype: jnp.dtype
    reverse: bool = False
    kernel: Callable | None = None
    name: str = "document_sums"


def _by_runs(inputs, runs, C, scale, kernel):
    """Computes the sums of packed documents; returns (o_BTGW, the final state).

    inputs: q, k (B, T, G, K), v (B, T, G, W), the initial state (B, G, K, W). runs: each token's
      document and block (B, T), where neighbours of one have equal numbers.
    """
    q_BTGK, k_BTGK, v_BTGW, state_BGKW = inputs
    B, T, G, K = q_BTGK.shape
    W = v_BTGW.shape[-1]
    C = chunk_blocks.chunk_length(C, T, least=16)
    chunks = -(-T // C)
    M = 1 if kernel else chunk_blocks.chunks_per_block(chunks, B * G, max(K, W))
    padding = -(-chunks // M) * M * C - T

    def padded(x_BTX, mode):
        return jnp.pad(x_BTX, ((0, 0), (0, padding), *((0, 0),) * (x_BTX.ndim - 2)), mode=mode)

    # Numbers of documents and blocks, with those of the tokens before and behind each.
    index = []
    for run_BT in runs:
        changed_BT = run_BT[:, 1:] != run_BT[:, :-1]
        index_BT = jnp.cumsum(jnp.pad(changed_BT, ((0, 0), (1, 0))).astype(jnp.int32), axis=1)
        index.append(padded(index_BT, "edge"))
    padded_inputs = (padded(x, "constant") for x in (q_BTGK, k_BTGK, v_BTGW))
    form = _Form(C, M * C, scale, v_BTGW.dtype, kernel=kernel)
    # The first document reads the initial state with its own sums, scaled.
    entry_BGKW = scale * state_BGKW
    o_BTGW, last_BGKW = _sums(form, *padded_inputs, entry_BGKW, tuple(index))
    one_B111 = (index[0][:, -1] == 0)[:, None, None, None]
    return o_BTGW[:, :T], last_BGKW + jnp.where(one_B111, state_BGKW, 0)


@custom_vjp(0)
def _sums(form, q_BTGK, k_BTGK, v_BTGW, entry_BGKW, runs):
    """Returns what the tokens read, (B, T, G, W), and the sum over one document, (B, G, K, W).

        o_t = scale sum_{s seen by t} (q_t^T k_s) v_s + [t in the first document] entry^T q_t
        sum = sum_{s in the last document} k_s v_s^T

    In reverse the entry is of the last document, and the sum over the first.

    runs: each token's document and block, (B, T), numbered from 0. To its left a token sees its
      document, to its right its block; in reverse, its block and its document.
    """
    compute = form.kernel or _computed
    return compute(form, q_BTGK, k_BTGK, v_BTGW, entry_BGKW, runs)


def _forward(form, *arrays):
    # By `_sums` and not its body, so that what differentiates this pass again finds its rule.
    return remat.named(_sums(form, *arrays)), arrays


def _backward(form, saved, cotangents):
    q_BTGK, k_BTGK, v_BTGW, entry_BGKW, runs = saved
    d_o_BTGW, d_sum_BGKW = cotangents

    def swapped(x_BGKW):
        return jnp.swapaxes(x_BGKW, 2, 3)

    # Token t sees s: dq_t sums over the s that t sees, dk_s and dv_s over the t that see s.
    def of(array, name, reverse):
        return form._replace(dtype=array.dtype, name=f"{form.name}_{name}", reverse=reverse)

    dq, _ = _sums(
        of(q_BTGK, "dq", form.reverse), d_o_BTGW, v_BTGW, k_BTGK, swapped(entry_BGKW), runs
    )
    dk, _ = _sums(
        of(k_BTGK, "dk", not form.reverse), v_BTGW, d_o_BTGW, q_BTGK, swapped(d_sum_BGKW), runs
    )
    dv, d_entry_BGKW = _sums(
        of(v_BTGW, "dv", not form.reverse), k_BTGK, q_BTGK, d_o_BTGW, d_sum_BGKW, runs
    )
    return dq, dk, dv, d_entry_BGKW, None


_sums.defvjp(_forward, _backward)


def _computed(form, q_BTGK, k_BTGK, v_BTGW, entry_BGKW, runs):
    """Computes `_sums`, the blocks of chunks in turn; the first pass sums what enters from the
    right."""
    L = form.L
    document_BT, block_BT = runs
    left_BT, right_BT = (block_BT, document_BT) if form.reverse else runs
    before_BT = jnp.pad(left_BT[:, :-1], ((0, 0), (1, 0)), mode="edge")
    behind_BT = jnp.pad(right_BT[:, 1:], ((0, 0), (0, 1)), mode="edge")
    last_B = document_BT[:, -1]
    zero_BGKW = jnp.zeros_like(entry_BGKW)

    # From the right: the sum over the run that a block's first token sees, from block to block.
    def from_right(state_BGKW, n):
        k_BLGK, v_BLGW, run_BL, behind_BL = chunk_blocks.read(
            (k_BTGK, v_BTGW, right_BT, behind_BT), n, L
        )
        first_BL = run_BL == run_BL[:, :1]
        local_BGKW = matmul.einsum(
            "BLGK,BLGW->BGKW", jnp.where(first_BL[..., None, None], k_BLGK, 0), v_BLGW
        )
        reaches_B = behind_BL[:, -1] == run_BL[:, 0]
        state_after = jnp.where(reaches_B[:, None, None, None], state_BGKW, 0) + local_BGKW
        return state_after, state_BGKW

    blocks = jnp.arange(v_BTGW.shape[1] // L)
    first_BGKW, right_NBGKW = jax.lax.scan(from_right, zero_BGKW, blocks, reverse=True)

    def block(left_BGKW, right_BGKW, cut):
        return *_block(form, left_BGKW, right_BGKW, entry_BGKW, last_B, *cut), None

    o_like = jnp.zeros_like(v_BTGW, form.dtype)
    cut = q_BTGK, k_BTGK, v_BTGW, (left_BT, right_BT, before_BT, behind_BT)
    o_BTGW, last_BGKW, _ = chunk_blocks.scan(
        block, zero_BGKW, cut, o_like, L, per_block=right_NBGKW
    )
    return o_BTGW, first_BGKW if form.reverse else last_BGKW


def _block(form, left_BGKW, right_BGKW, entry_BGKW, last_B, q_BLGK, k_BLGK, v_BLGW, runs):
    """Returns the output (B, L, G, W) of a block of chunks, and the sum that leaves it rightwards.

    left_BGKW, right_BGKW: what enters the block from both sides, without the entry.
    """
    B, L, G, W = v_BLGW.shape
    M, C, E = L // form.C, form.C, B * G

    def by_chunk(x_BLGX):
        return chunk_blocks.to_chunks(x_BLGX, C).reshape(M, E, C, -1)

    def rows(x_B):
        return jnp.broadcast_to(x_B[:, None], (B, G)).reshape(E)

    q_MECK, k_MECK, v_MECW = map(by_chunk, (q_BLGK, k_BLGK, v_BLGW))
    left_MEC, right_MEC, before_MEC, behind_MEC = (
        by_chunk(jnp.broadcast_to(x[:, :, None, None], (B, L, G, 1)))[..., 0] for x in runs
    )
    before_ME, behind_ME = before_MEC[..., 0], behind_MEC[..., -1]

    # A_ij = q_i^T k_j where j <= i is in i's run to the left, or j > i in that to the right
    lower_CC = jnp.tril(jnp.ones((C, C), bool))[None, None]
    same_left_MECC = left_MEC[..., :, None] == left_MEC[..., None, :]
    same_right_MECC = right_MEC[..., :, None] == right_MEC[..., None, :]
    seen_MECC = jnp.where(lower_CC, same_left_MECC, same_right_MECC)
    A_MECC = jnp.where(seen_MECC, matmul.einsum("MEiK,MEjK->MEij", q_MECK, k_MECK), 0)

    # What the chunk adds to the run that crosses its right edge, and to that on its left edge
    def masked(runs_MEC, edge_ME, x_MECK):
        return jnp.where((runs_MEC == edge_ME[..., None])[..., None], x_MECK, 0)

    to_right_MECK = masked(left_MEC, left_MEC[..., -1], k_MECK)
    to_left_MECK = masked(right_MEC, right_MEC[..., 0], k_MECK)
    to_right_MEKW = matmul.einsum("MEjK,MEjW->MEKW", to_right_MECK, v_MECW)
    to_left_MEKW = matmul.einsum("MEjK,MEjW->MEKW", to_left_MECK, v_MECW)

    # P: the sum that enters each chunk from the left; Q: from the right
    passes_ME = before_ME == left_MEC[..., -1]
    P_MEKW, P_EKW = _carried(left_BGKW, passes_ME, to_right_MEKW)
    passes_ME = behind_ME == right_MEC[..., 0]
    Q_MEKW, _ = _carried(right_BGKW, passes_ME, to_left_MEKW, reverse=True)
    P_MEKW, Q_MEKW = form.scale * P_MEKW, form.scale * Q_MEKW
    entry_1EKW = entry_BGKW.reshape(1, E, -1, W)
    if form.reverse:
        entered_ME = behind_ME == rows(last_B)[None]
        Q_MEKW = Q_MEKW + jnp.where(entered_ME[..., None, None], entry_1EKW, 0)
    else:
        P_MEKW = P_MEKW + jnp.where((before_ME == 0)[..., None, None], entry_1EKW, 0)

    # o = scale A v + P^T q + Q^T q, P and Q where the token is of the run that crosses the edge
    o_MECW = matmul.einsum("MEij,MEjW->MEiW", form.scale * A_MECC, v_MECW)
    q_left_MECK, q_right_MECK = (
        masked(left_MEC, before_ME, q_MECK),
        masked(right_MEC, behind_ME, q_MECK),
    )
    o_MECW = o_MECW + matmul.einsum("MEiK,MEKW->MEiW", q_left_MECK, P_MEKW)
    o_MECW = o_MECW + matmul.einsum("MEiK,MEKW->MEiW", q_right_MECK, Q_MEKW)
    o_BLGW = chunk_blocks.from_chunks(o_MECW.astype(form.dtype).reshape(M, B, G, C, W))
    return o_BLGW, P_EKW.reshape(left_BGKW.shape)


def _carried(state_BGKW, passes_ME, local_MEKW, reverse=False):
    """Returns each chunk's entering state, and the last one, by S' = [passes] S + local."""

    def body(state_EKW, chunk):
        passes_E, local_EKW = chunk
        return jnp.where(passes_E[:, None, None], state_EKW, 0) + local_EKW, state_EKW

    state_EKW = state_BGKW.reshape(local_MEKW.shape[1:])
    final_EKW, state_MEKW = jax.lax.scan(body, state_EKW, (passes_ME, local_MEKW), reverse=reverse)
    return state_MEKW, final_EKW
