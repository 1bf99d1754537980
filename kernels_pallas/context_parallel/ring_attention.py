"""Softmax attention to keys on several ranks: all gathered, in a window, or passed round a ring.

`operators.softmax_attention` says what each costs. In the ring a message holds one rank's keys and
values with their positions and document ids, and each rank holds one message at a time while it
sends that message on. Each rank's queries keep a running maximum, sum and output
(`softmax_attention/chunked.py`), which every message updates by the log-sum-exp merge. In the
backward pass the final log-sum of each query gives a message's probabilities again, and gradients
of keys and values travel round the ring behind their keys.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.common import kernel_vjp, segments
from kernels_pallas.context_parallel import collectives
from kernels_pallas.ops.softmax_attention import chunked
from kernels_pallas.ops.softmax_attention.visibility import Visibility


def gathered(ranks, attend, qkv, given):
    """Returns this rank's attention output (B, T, H, V), after one all-gather of keys and values.

    attend: `kernels_pallas.softmax_attention` with its options bound.
    qkv: this rank's queries, keys and values.
    given: the keywords segment_ids, kv_segment_ids_BS, q_positions_BT and kv_positions_BS of
      `operators.softmax_attention`; each value may be None.
    """
    q_BTHK, k_BSGK, v_BSGV = qkv
    (B, T), S = q_BTHK.shape[:2], k_BSGK.shape[1]
    segment_ids_BT, kv_segment_BS = given["segment_ids"], given["kv_segment_ids_BS"]
    own = segment_ids_BT is not None and kv_segment_BS is None
    # Sent: keys, values, and their ids and positions where given, in one all-gather.
    payload = k_BSGK, v_BSGV, segment_ids_BT if own else kv_segment_BS, given["kv_positions_BS"]
    packed = lax.all_gather(collectives.pack(payload, lead=2), ranks.axis_name, axis=1, tiled=True)
    k_BSGK, v_BSGV, kv_segment_BS, kv_position_BS = collectives.unpack(packed, payload, lead=2)
    # Positions in the whole sequence.
    q_position_BT = given["q_positions_BT"]
    if kv_position_BS is None:
        q_position_BT = _positions(ranks, B, T)
        kv_position_BS = jnp.arange(S * ranks.count, dtype=jnp.int32)[None]
        kv_position_BS = jnp.broadcast_to(kv_position_BS, (B, S * ranks.count))
    # Documents are runs of equal ids, counted over the whole sequence.
    if own:
        kv_segment_BS = segments.run_index(kv_segment_BS)
        segment_ids_BT = lax.dynamic_slice_in_dim(kv_segment_BS, ranks.index * T, T, axis=1)
    return attend(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        segment_ids=segment_ids_BT,
        kv_segment_ids_BS=kv_segment_BS,
        q_positions_BT=q_position_BT,
        kv_positions_BS=kv_position_BS,
    )


def windowed(ranks, attend, qkv, segment_ids_BT, window, causal):
    """Returns this rank's sliding-window attention output, (B, T, H, V).

    Each rank receives only the window-1 tokens before its shard, and as many after it where not
    `causal`. attend and qkv are as in `gathered`.
    """
    q_BTHK, *kv = qkv
    (B, T), W = q_BTHK.shape[:2], ranks.count
    reach = min(window - 1, (W - 1) * T)
    payload = *kv, segment_ids_BT
    packed = collectives.pack(payload, lead=2)
    # Sent: the last `reach` tokens of the shards before, and the first of those after.
    parts = [collectives.preceding_tokens(ranks, packed, reach), packed]
    if not causal:
        following = collectives.preceding_tokens(ranks.reversed(), packed[:, ::-1], reach)
        parts.append(following[:, ::-1])
    k_BSGK, v_BSGV, segment_BS = collectives.unpack(jnp.concatenate(parts, axis=1), payload, lead=2)
    S = k_BSGK.shape[1]
    position_S = ranks.index * T - reach + jnp.arange(S, dtype=jnp.int32)
    exists_1S = ((position_S >= 0) & (position_S < W * T))[None]
    run_BS = None if segment_BS is None else segments.run_index(segment_BS)
    own = slice(reach, reach + T)
    if reach <= T:
        # Kernels tell tokens by their index: queries for the other tokens are added, and dropped.
        ids_BS = jnp.broadcast_to(jnp.where(exists_1S, 0 if run_BS is None else run_BS, -1), (B, S))
        q_BSHK = jnp.pad(q_BTHK, ((0, 0), (reach, S - reach - T), (0, 0), (0, 0)))
        return attend(q_BSHK, k_BSGK, v_BSGV, segment_ids=ids_BS)[:, own]
    return attend(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        segment_ids=None if run_BS is None else run_BS[:, own],
        kv_segment_ids_BS=run_BS,
        q_positions_BT=jnp.broadcast_to(position_S[None, own], (B, T)),
        kv_positions_BS=jnp.broadcast_to(jnp.where(exists_1S, position_S[None], -1), (B, S)),
    )


def ring(ranks, qkv, given, by_index, window, causal, scale):
    """Returns this rank's attention output (B, T, H, V) by ring attention (arXiv 2310.01889).

    Keys and values travel round the ranks; queries stay. qkv and given are as in `gathered`.
    by_index says that no positions or key ids are given: then a causal ring balances its ranks by
    the zigzag layout.
    """
    q_BTHK, k_BSGK, v_BSGV = qkv
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_segment_BT, kv_segment_BS, q_position_BT, kv_position_BS = given.values()
    if q_position_BT is None:
        q_position_BT, kv_position_BS = (_positions(ranks, B, size) for size in (T, S))
    if q_segment_BT is not None and kv_segment_BS is None:
        q_segment_BT = kv_segment_BS = _run_index(ranks, q_segment_BT)
    # Sent to balance causal attention: halves of the shards, to the zigzag layout.
    balanced = by_index and causal and T % 2 == 0 and ranks.count > 1
    if balanced:
        everything = q_BTHK, k_BSGK, v_BSGV, q_segment_BT, q_position_BT
        packed = _to_zigzag(ranks, collectives.pack(everything, lead=2))
        everything = collectives.unpack(packed, everything, lead=2)
        q_BTHK, k_BSGK, v_BSGV, q_segment_BT, q_position_BT = everything
        kv_segment_BS, kv_position_BS = q_segment_BT, q_position_BT
    # Not `aligned`: a token's place is known by its position alone.
    visibility = Visibility(
        q_position_BT, kv_position_BS, q_segment_BT, kv_segment_BS, causal, window, aligned=False
    )
    # Queries stay, in blocks of C; keys and values go round, in blocks of E.
    C, E = sizes = chunked.block_sizes(T, S)
    scale = K**-0.5 if scale is None else scale
    q_BGRTK = chunked.queries_first(q_BTHK, G, C)
    o_BGRTV = _ring((ranks, scale, sizes), visibility, q_BGRTK, k_BSGK, v_BSGV)
    o_BTHV = chunked.time_first(o_BGRTV, T).astype(q_BTHK.dtype)
    return _from_zigzag(ranks, o_BTHV) if balanced else o_BTHV


def zigzag_order(ranks: int, length: int) -> np.ndarray:
    """Returns the token indices (length,) of the zigzag layout, which balances causal attention.

    The sequence is cut into 2W equal parts for W = `ranks` ranks, and rank r gets parts r and
    2W-1-r. x[:, zigzag_order(W, T)], split over W ranks, has this layout; the returned indices are
    its tokens' positions, and `np.argsort` of them gives the way back. It is for models of softmax
    attention alone: recurrences need time in order, and the ring of `softmax_attention` balances
    contiguous shards itself.

    Raises:
      ValueError: the length is not a multiple of 2 W.
    """
    if length % (2 * ranks):
        raise ValueError(
            f"zigzag_order: {length} tokens do not divide into 2 parts for each of {ranks} ranks: "
            f"use a multiple of {2 * ranks}"
        )
    parts = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([parts[[r, 2 * ranks - 1 - r]].reshape(-1) for r in range(ranks)])


def _forward(static, visibility, q_BGRTK, k_BSGK, v_BSGV):
    ranks, scale, sizes = static
    payload = _payload(visibility, k_BSGK, v_BSGV)

    def see(running, packed):
        held = _held(payload, packed, q_BGRTK, visibility, sizes)
        return chunked.update(running, q_BGRTK, *held, scale, sizes)

    def hop(carry, _):
        # The message travels on while this rank attends to it.
        running, packed = carry
        arriving = ranks.send(packed, _round(ranks))
        return (see(running, packed), arriving), None

    running = chunked.initial(q_BGRTK, v_BSGV)
    carry = running, collectives.pack(payload, lead=2)
    (running, packed), _ = lax.scan(hop, carry, length=ranks.count - 1)
    o_BGRTV, log_sum_BGRT = chunked.normalized(see(running, packed))
    return o_BGRTV, (o_BGRTV, log_sum_BGRT)


def _backward(static, visibility, arrays, residuals, g_BGRTV):
    ranks, scale, sizes = static
    (q_BGRTK, k_BSGK, v_BSGV), (o_BGRTV, log_sum_BGRT) = arrays, residuals
    payload = _payload(visibility, k_BSGK, v_BSGV)
    rows = q_BGRTK, g_BGRTV, log_sum_BGRT, jnp.sum(g_BGRTV * o_BGRTV, axis=-1)
    S, dtype = k_BSGK.shape[1], q_BGRTK.dtype

    def see(dq_BGRTK, d_BGSX, packed):
        # Adds the message's share of dq, and this rank's share of its keys' and values' gradients.
        held = _held(payload, packed, q_BGRTK, visibility, sizes)
        dq_BGRTK, *d_kv = chunked.update_backward(dq_BGRTK, rows, *held, scale, sizes)
        return dq_BGRTK, d_BGSX + jnp.concatenate(d_kv, axis=-1)[:, :, :S]

    def hop(carry, _):
        # Keys and values travel on at once, their gradients when this rank has added to them.
        dq_BGRTK, d_BGSX, packed = carry
        arriving = ranks.send(packed, _round(ranks))
        dq_BGRTK, d_BGSX = see(dq_BGRTK, d_BGSX, packed)
        return (dq_BGRTK, ranks.send(d_BGSX, _round(ranks)), arriving), None

    dq_BGRTK = jnp.zeros_like(q_BGRTK, o_BGRTV.dtype)
    B, _, G, K = k_BSGK.shape
    d_BGSX = jnp.zeros_like(dq_BGRTK, shape=(B, G, S, K + v_BSGV.shape[-1]))
    carry = dq_BGRTK, d_BGSX, collectives.pack(payload, lead=2)
    carry, _ = lax.scan(hop, carry, length=ranks.count - 1)
    dq_BGRTK, d_BGSX = see(*carry)
    # The last hop brings the gradients back to their keys' rank.
    d_BGSX = ranks.send(d_BGSX, _round(ranks))
    d_k, d_v = (z.swapaxes(1, 2).astype(dtype) for z in jnp.split(d_BGSX, [K], axis=-1))
    return dq_BGRTK.astype(dtype), d_k, d_v


def _plain(static, visibility, q_BGRTK, k_BSGK, v_BSGV):
    """Computes ring attention's output from an all-gather of keys and values instead of a ring.

    JAX can differentiate it any number of times; it serves derivatives of higher order.
    """
    ranks, scale, sizes = static
    payload = _payload(visibility, k_BSGK, v_BSGV)
    packed = collectives.pack(payload, lead=2)
    packed = lax.all_gather(packed, ranks.axis_name, axis=1, tiled=True)
    *kv, visibility = _held(payload, packed, q_BGRTK, visibility, sizes)
    return chunked.plain((scale, sizes), visibility, q_BGRTK, *kv)


_ring = kernel_vjp.differentiable(_forward, _backward, _plain)


def _payload(visibility, k_BSGK, v_BSGV):
    """Returns the arrays that one message of the ring carries from rank to rank.

    They are this rank's keys and values, and the keys' positions and document ids.
    """
    return k_BSGK, v_BSGV, visibility.kv_position_BS, visibility.kv_segment_BS


def _round(ranks):
    """Returns the pairs (from, to) of ranks that send each message to the next rank in a ring."""
    return [(place, (place + 1) % ranks.count) for place in range(ranks.count)]


def _held(payload, packed, q_BGRTK, visibility, sizes):
    """Unpacks a message of the ring: keys, values, and their Visibility to this rank's queries.

    payload: arrays of the shapes and dtypes that `packed` holds. Keys and values come out with
    heads before time, padded to whole blocks.
    """
    k_BSGK, v_BSGV, kv_position_BS, kv_segment_BS = collectives.unpack(packed, payload, lead=2)
    visibility = dataclasses.replace(
        visibility, kv_position_BS=kv_position_BS, kv_segment_BS=kv_segment_BS
    )
    C, E = sizes
    k_BGSK, v_BGSV = (chunked.keys_first(z, E) for z in (k_BSGK, v_BSGV))
    queries = q_BGRTK.shape[3] - visibility.q_position_BT.shape[1]
    return k_BGSK, v_BGSV, visibility.padded(queries, k_BGSK.shape[2] - k_BSGK.shape[1])


def _positions(ranks, B, T):
    """Returns the positions of this rank's tokens in the whole sequence."""
    position_T = ranks.index * T + jnp.arange(T, dtype=jnp.int32)
    return jnp.broadcast_to(position_T[None], (B, T))


def _run_index(ranks, segment_ids_BT):
    """Returns each token's document number (B, T), counted from 0 over the whole sequence.

    A document is a run of equal ids, which may span ranks; one all-gather counts earlier ones.
    """
    run_BT = segments.run_index(segment_ids_BT)
    # Sent: each shard's first and last id, and how many documents begin within it.
    ends = segment_ids_BT[:, 0], segment_ids_BT[:, -1], run_BT[:, -1]
    gathered = ranks.gather(collectives.pack(ends, lead=1))
    first_WB, last_WB, starts_WB = collectives.unpack(gathered, ends, lead=1)
    # Documents begun before this shard: within shards and at their borders, its own included.
    begins_WB = jnp.pad(first_WB[1:] != last_WB[:-1], ((1, 0), (0, 0)))
    begun_WB = jnp.cumsum(begins_WB + jnp.pad(starts_WB[:-1], ((1, 0), (0, 0))), axis=0)
    return run_BT + jnp.take(begun_WB, ranks.index, axis=0)[:, None]


def _to_zigzag(ranks, x_BTX):
    """Moves an array from contiguous shards of time to the zigzag layout.

    Of 2W equal parts of the sequence, rank r holds parts 2r and 2r+1 before, r and 2W-1-r after.
    """
    even, odd = (
        ranks.send(half, [(r, _zigzag_rank(ranks, 2 * r + n)) for r in range(ranks.count)])
        for n, half in enumerate(jnp.split(x_BTX, 2, axis=1))
    )
    low_is_even = ranks.index % 2 == 0
    parts = jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)
    return jnp.concatenate(parts, axis=1)


def _from_zigzag(ranks, x_BTX):
    """Moves an array from the zigzag layout of time back to contiguous shards."""
    low, high = jnp.split(x_BTX, 2, axis=1)
    low_is_even = ranks.index % 2 == 0
    even_odd = jnp.where(low_is_even, low, high), jnp.where(low_is_even, high, low)
    parts = (
        ranks.send(half, [(_zigzag_rank(ranks, 2 * r + n), r) for r in range(ranks.count)])
        for n, half in enumerate(even_odd)
    )
    return jnp.concatenate(list(parts), axis=1)


def _zigzag_rank(ranks, part):
    """Returns the rank that holds part `part` of 2W in the zigzag layout."""
    return min(part, 2 * ranks.count - 1 - part)
