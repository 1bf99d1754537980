"""Sums over whole documents, with time split over ranks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kernels_pallas
from kernels_pallas import dispatch
from kernels_pallas.common import arguments, remat, segments
from kernels_pallas.context_parallel import collectives, shard_maps
from kernels_pallas.dispatch import manual_axes
from kernels_pallas.ops.document_sums import api


def document_sums(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    blocks: int | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    block_size: int | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes `kernels_pallas.document_sums` with time split over `axis_name`.

    whole rows   Without segment ids and block_size one all-reduce of B H K V numbers adds the
                 shards' sums k^T v in the forward pass, and another their cotangents in the
                 backward pass, whatever `collective` says. The final state needs no other.
    documents    Each rank runs the operator on its own tokens, from zero. The sum of the shard's
                 last document then goes to later ranks, that of its first document to earlier ones,
                 and a token adds what it reads of either: o_t += scale S^T q_t. So each pass has
                 the collectives of `linear_attention` (decay: a number per head) twice, once in
                 either direction.
    blocks       With block_size the sum of the shard's last document goes to later ranks, and that
                 of its first block to earlier ones. Without segment ids, where block_size divides
                 the shard, the latter is absent. With segment ids and block_size one more
                 all-gather, of 13 small numbers per row and rank, says where documents begin.

    In bfloat16 the output is rounded once more per direction than on one device.
    """
    name = "document_sums"
    form = collectives.form(name, axis_name, collective, blocks, v_BTHV.shape[-1])
    inputs = q_BTHK, k_BTHK, v_BTHV, initial_state, segment_ids
    q_BTHK, k_BTHK, v_BTHV, initial_state, segment_ids = manual_axes.alike(inputs, axis_name)
    # Raises what the plain operator raises.
    operator = functools.partial(
        kernels_pallas.document_sums, scale=scale, block_size=block_size, chunk_size=chunk_size
    )
    given = {"initial_state": initial_state, "segment_ids": segment_ids}
    plain = functools.partial(operator, implementation=implementation)
    _, final_like = jax.eval_shape(plain, q_BTHK, k_BTHK, v_BTHV, **given)
    initial_BHKV = jnp.zeros_like(v_BTHV, final_like.dtype, final_like.shape)
    if initial_state is not None:
        initial_BHKV = initial_state.astype(final_like.dtype)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), form.ranks.from_last(initial_BHKV)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    T, W = v_BTHV.shape[1], form.ranks.count

    if segment_ids is None and (block_size is None or block_size >= T * W):
        # S = initial state + the sums of all shards, one all-reduce; o_t = scale S^T q_t
        local_BHKV = _sum_over(None, k_BTHK, v_BTHV)
        local_BHKV = local_BHKV + jnp.where(form.ranks.index == 0, initial_BHKV, 0)
        state_BHKV = remat.named(lax.psum(local_BHKV, form.ranks.axis_name), remat.ENTERING_STATES)
        entering_BHKV = manual_axes.alike(state_BHKV, axis_name)
        o_BTHV = (scale * _read(None, q_BTHK, entering_BHKV)).astype(v_BTHV.dtype)
        return o_BTHV, state_BHKV.astype(final_like.dtype)

    zero_BHKV = jnp.zeros_like(initial_BHKV)
    if segment_ids is None and block_size is not None and T % block_size == 0:
        # Shards of whole blocks: one document, and no block crosses a border.
        o_BTHV, _ = plain(q_BTHK, k_BTHK, v_BTHV, initial_state=zero_BHKV)
        state_BHKV, final_BHKV = _from_earlier(form, None, k_BTHK, v_BTHV, initial_state)
        reads = [_read_scaled(scale, None, q_BTHK, state_BHKV)]
    else:
        document_BT, block_BT = _runs(form.ranks, v_BTHV, segment_ids, block_size)
        # The shard on its own, from zero.
        o_BTHV, _ = dispatch.run(
            api.OPERATOR,
            implementation,
            q_BTGK=q_BTHK,
            k_BTGK=k_BTHK,
            v_BTHV=v_BTHV,
            initial_state_BHKV=zero_BHKV,
            segment_ids_BT=document_BT,
            block_ids_BT=block_BT,
            block_size=None,
            chunk_size=chunk_size,
            scale=scale,
        )
        # From earlier ranks, the sum of the document that crosses the shard's left border.
        crossing_BT = None if segment_ids is None else document_BT
        state_BHKV, final_BHKV = _from_earlier(form, crossing_BT, k_BTHK, v_BTHV, initial_state)
        first_BT = None if segment_ids is None else segments.run_index(document_BT) == 0
        reads = [_read_scaled(scale, first_BT, q_BTHK, state_BHKV)]
        # From later ranks, the sum of the block that crosses its right border.
        state_BHKV = _from_later(form, block_BT, k_BTHK, v_BTHV)
        index_BT = segments.run_index(block_BT)
        last_BT = index_BT == index_BT[:, -1:]
        reads.append(_read_scaled(scale, last_BT, q_BTHK, state_BHKV))
    read_BTHV = functools.reduce(jnp.add, reads)
    o_BTHV = (o_BTHV.astype(read_BTHV.dtype) + read_BTHV).astype(v_BTHV.dtype)
    return o_BTHV, final_BHKV.astype(final_like.dtype)


def _sum_over(mask_BT, k_BTHK, v_BTHV):
    """Returns sum_t k_t v_t^T (B, H, K, V) over a shard's tokens in the mask; None is all."""
    if mask_BT is not None:
        k_BTHK = jnp.where(mask_BT[..., None, None], k_BTHK, 0)
    return shard_maps.local_state(k_BTHK, v_BTHV, None, None)[0]


def _read(mask_BT, q_BTHK, state_BHKV):
    """Returns S^T q_t (B, T, H, V), and 0 for tokens outside of the mask; None is all."""
    if mask_BT is not None:
        q_BTHK = jnp.where(mask_BT[..., None, None], q_BTHK, 0)
    return shard_maps.read_state(q_BTHK, state_BHKV, None, None)


def _read_scaled(scale, mask_BT, q_BTHK, state_BHKV):
    return scale * jax.checkpoint(_read)(mask_BT, q_BTHK, state_BHKV)


def _from_earlier(form, document_BT, k_BTHK, v_BTHV, initial_state):
    """Returns the sum that enters a shard from earlier ranks, and the sequence's final state.

    document_BT: numbers of documents, equal across a border where one document crosses it; None is
      one document.
    """
    if document_BT is None:
        index_BT = mask_BT = first_B = last_B = None
        passes_B111 = jnp.ones_like(v_BTHV[:, :1, :1, :1], jnp.float32)
    else:
        index_BT = segments.run_index(document_BT)
        mask_BT = index_BT == index_BT[:, -1:]
        first_B, last_B = document_BT[:, 0], document_BT[:, -1]
        passes_B111 = (index_BT[:, -1] == 0)[:, None, None, None].astype(jnp.float32)
    local_BHKV = jax.checkpoint(_sum_over)(mask_BT, k_BTHK, v_BTHV)
    decay = passes_B111.astype(local_BHKV.dtype)
    return collectives.entering_state(form, local_BHKV, decay, first_B, last_B, initial_state)


def _from_later(form, block_BT, k_BTHK, v_BTHV):
    """Returns the sum that enters a shard from later ranks: of the block that crosses its border.

    block_BT: numbers of blocks, equal across a border where one block crosses it.
    """
    index_BT = segments.run_index(block_BT)
    local_BHKV = jax.checkpoint(_sum_over)(index_BT == 0, k_BTHK, v_BTHV)
    decay = (index_BT[:, -1] == 0)[:, None, None, None].astype(local_BHKV.dtype)
    form = form._replace(ranks=form.ranks.reversed())
    first_B, last_B = block_BT[:, -1], block_BT[:, 0]
    return collectives.entering_state(form, local_BHKV, decay, first_B, last_B)[0]


def _runs(ranks, v_BTHV, segment_ids_BT: Any, block_size: int | None) -> tuple[Any, Any]:
    """Returns numbers of each token's document and block, (B, T), equal within one across ranks."""
    B, T = v_BTHV.shape[:2]
    if block_size is None:
        return segment_ids_BT, segment_ids_BT
    index_BT = jnp.zeros_like(v_BTHV, jnp.int32, (B, T)) + jnp.arange(T, dtype=jnp.int32)[None]
    index_BT = index_BT + (ranks.index * T).astype(jnp.int32)
    document_BT, start_BT = jnp.zeros_like(index_BT), jnp.zeros_like(index_BT)
    if segment_ids_BT is not None:
        document_BT, start_BT = segment_ids_BT, _document_starts(ranks, segment_ids_BT, index_BT)
    # A block is known by the index of its first token in the whole sequence.
    return document_BT, index_BT - (index_BT - start_BT) % block_size


def _document_starts(ranks, segment_ids_BT, index_BT):
    """Returns the index in the whole sequence of the first token of each token's document, (B, T).

    index_BT: of each token. One all-gather tells where earlier shards' last documents begin.
    """
    start_BT = index_BT - segments.positions(segment_ids_BT)
    one_B = start_BT[:, -1] == index_BT[:, 0]
    # Sent: each shard's first and last id, where its last document begins, and if that is all.
    ends = segment_ids_BT[:, 0], segment_ids_BT[:, -1], start_BT[:, -1], one_B
    gathered = ranks.gather(collectives.pack(ends, lead=1))
    first_WB, last_WB, start_WB, one_WB = collectives.unpack(gathered, ends, lead=1)
    joined_WB = jnp.pad(first_WB[1:] == last_WB[:-1], ((1, 0), (0, 0)))
    # A shard that is all of a document which began earlier has no start of its own.
    own_WB = jnp.where(one_WB & joined_WB, -1, start_WB)
    begun_WB = lax.cummax(own_WB, axis=0)
    here, before = ranks.index, jnp.maximum(ranks.index - 1, 0)
    joined_B = jnp.take(joined_WB, here, axis=0)
    begun_B = jnp.take(begun_WB, before, axis=0)
    entered_BT = joined_B[:, None] & (start_BT == index_BT[:, :1])
    return jnp.where(entered_BT, begun_B[:, None], start_BT)
