"""Packed documents: the masks and indices that operators derive from `segment_ids_BT`.

A document is a run of equal ids. A state (or convolution tap) enters a token exactly when the token
before it, in the same row, has the same id. `initial_state` enters the first token of a row.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.common import matmul


def starts(segment_ids_BT: jax.Array, reverse: bool = False) -> jax.Array:
    """Returns True (B, T) at each document's first token, but not at a row's first token.

    There an initial state enters.
    reverse: whether time runs backwards, so that a document begins at its last token; then the
      exception is the row's last token.
    """
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (0, 1) if reverse else (1, 0)))


def run_index(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the index (B, T) of each token's document, counted from 0 in its row."""
    return count_starts(starts(segment_ids_BT))


def count_starts(start_BT: jax.Array) -> jax.Array:
    """Returns each token's document index (B, T), counted from the starts that `starts` gives."""
    return jnp.cumsum(start_BT.astype(jnp.int32), axis=1)


def positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the position (B, T) of each token in its document, counted from 0."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    start_index_BT = jnp.where(starts(segment_ids_BT), index_T[None], 0)
    return index_T[None] - jax.lax.cummax(start_index_BT, axis=1)


def block_index(segment_ids_BT: jax.Array, block_size: int) -> jax.Array:
    """Returns the index (B, T) of each token's block of `block_size` tokens, from 0 in its row.

    Blocks are counted from the start of each document, so the last one of a document may be short.
    """
    start_BT = starts(segment_ids_BT) | (positions(segment_ids_BT) % block_size == 0)
    return count_starts(start_BT.at[:, 0].set(False))


def recurrent(
    one_step, inputs, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, scale: float = 1.0
):
    """Runs a matrix recurrence by its definition, as one `lax.scan` over time.

    one_step: (inputs of a token, its log decay, the state) -> (o_BHV, the next state).
    inputs: with heads alike, v the third; computed in the state's dtype. scale: of the output.
    """
    dtype = initial_state_BHKV.dtype

    def scan_step(state_BHKV, step_inputs):
        arrays, log_decay_BHK, start_B = step_inputs
        if start_B is not None:
            state_BHKV = jnp.where(start_B[:, None, None, None], 0.0, state_BHKV)
        o_BHV, state_BHKV = one_step(*arrays, log_decay_BHK, state_BHKV)
        return state_BHKV, o_BHV

    def time_first(x):
        return jnp.moveaxis(x, 1, 0)

    arrays = jax.tree.map(lambda x: time_first(x.astype(dtype)), inputs)
    log_decay_TBHK = None if log_decay_BTHK is None else time_first(log_decay_BTHK.astype(dtype))
    start_TB = None if segment_ids_BT is None else time_first(starts(segment_ids_BT))
    final_BHKV, o_TBHV = jax.lax.scan(
        scan_step, initial_state_BHKV, (arrays, log_decay_TBHK, start_TB)
    )
    v_BTHV = inputs[2]
    return jnp.moveaxis(scale * o_TBHV, 0, 1).astype(v_BTHV.dtype), final_BHKV


def _reached(bad_BTH, segment_ids_BT, block_ids_BT):
    """Returns whether a bad token of each token's document, or it itself, reaches it: (B, T, H).

    A bad token reaches itself and later tokens; with blocks (None is none) its whole block, too.
    """
    T = bad_BTH.shape[1]
    index_T1 = jnp.arange(T, dtype=jnp.int32)[:, None]
    # A token is reached if the last bad one of its head does not lie before its document,
    first_BT = index_T1[:, 0][None] - positions(segment_ids_BT)
    last_bad_BTH = jax.lax.cummax(jnp.where(bad_BTH, index_T1[None], -1), axis=1)
    reached_BTH = last_bad_BTH >= first_BT[..., None]
    if block_ids_BT is None:
        return reached_BTH
    # or if the next bad one does not lie behind its block.
    ends_BT = jnp.pad(block_ids_BT[:, 1:] != block_ids_BT[:, :-1], ((0, 0), (0, 1)))
    end_index_BT = jnp.where(ends_BT, index_T1[:, 0][None], T - 1)
    last_BT = jax.lax.cummin(end_index_BT, axis=1, reverse=True)
    next_bad_BTH = jnp.where(bad_BTH, index_T1[None], T)
    next_bad_BTH = jax.lax.cummin(next_bad_BTH, axis=1, reverse=True)
    return reached_BTH | (next_bad_BTH <= last_BT[..., None])


def isolated(operator):
    """Wraps a matrix recurrence, whose masks are products with 0, so that NaN and Inf stay in their
    document.

    From a token (or an initial state) that is not finite on, its head's outputs are NaN up to the
    document's end; no other output is NaN, and gradients are those of the other outputs. The
    wrapper costs a pass over the arguments, so calls without segment ids go without: there, a
    chunk's earlier tokens may be NaN too. So may other documents where finite arguments overflow.

    An operator whose tokens see later ones, too, has an argument `block_ids_BT`: runs of equal
    numbers are blocks of tokens that see each other. There outputs are NaN from the first bad
    token's block on.
    """

    def call(*, initial_state_BHKV, segment_ids_BT, **inputs):
        if segment_ids_BT is None:
            return operator(
                initial_state_BHKV=initial_state_BHKV, segment_ids_BT=segment_ids_BT, **inputs
            )
        B, T = segment_ids_BT.shape
        H = initial_state_BHKV.shape[1]
        bad_BTH = jnp.zeros((B, T, H), bool)
        for name, x in inputs.items():
            if "_BT" not in name or x is None or jnp.issubdtype(x.dtype, jnp.integer):
                continue
            inputs[name], bad_BTG = matmul.cleared(x)
            bad_BTH |= jnp.repeat(bad_BTG, H // x.shape[2], axis=2)
        finite_BHKV = jnp.isfinite(initial_state_BHKV)
        bad_BTH = bad_BTH.at[:, 0].set(bad_BTH[:, 0] | ~jnp.all(finite_BHKV, axis=(2, 3)))
        bad_BTH = _reached(bad_BTH, segment_ids_BT, inputs.get("block_ids_BT"))
        o_BTHV, final_BHKV = operator(
            initial_state_BHKV=jnp.where(finite_BHKV, initial_state_BHKV, 0),
            segment_ids_BT=segment_ids_BT,
            **inputs,
        )
        o_BTHV = jnp.where(bad_BTH[..., None], jnp.nan, o_BTHV)
        return o_BTHV, jnp.where(bad_BTH[:, -1, :, None, None], jnp.nan, final_BHKV)

    return call
