"""Documents padded to one length, for mixers whose weights belong to positions in a document."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.modules import grids, positions

# (x_BMD, seen_BM, number of the document in its row) -> (y_BME, a pytree of sums over the batch)
Function = Callable[[Array, Array, Array | int], tuple[Array, Any]]


def each_document(
    function: Function,
    x_BTD: Array,
    segment_ids_BT: Array | None,
    max_length: int,
    *,
    position_BT: Array,
    first_BMD: Array | None = None,
) -> tuple[Array, Any]:
    """Applies a function to every document by itself, padded to M = `max_length` positions.

    Packed rows cost as many calls as the row with the most documents has, one after the other;
    memory does not grow with their number. Tokens at positions of M and more are not seen, and
    their result is 0.

    Args:
      function: (x_BMD, seen_BM, run) -> (y_BME, sums), for each row's document number `run`.
        Position m of the document is row m of x_BMD, which is 0 where seen_BM is False; a row that
        has fewer documents comes with no position seen. `sums`, a pytree of float32 arrays, is
        added over the calls.
      position_BT: each token's position in its document, all different.
      first_BMD: earlier inputs of each row's first document; rows of zeros where there are none.

    Returns:
      y_BTE, and the sums.
    """
    M, T = max_length, x_BTD.shape[1]
    run_BT = None if segment_ids_BT is None else operators.run_index(segment_ids_BT)

    def one(run):
        # Position m of document number `run` holds the token index_BM[m], if there is one.
        slot_BT = position_BT if run_BT is None else jnp.where(run_BT == run, position_BT, M)
        x_BMD, seen_BM = slots(x_BTD, slot_BT, M)
        if first_BMD is not None:
            x_BMD += jnp.where(run == 0, first_BMD, 0).astype(x_BMD.dtype)
        y_BME, sums = function(x_BMD, seen_BM, run)
        y_BTE = jnp.take_along_axis(y_BME, jnp.minimum(slot_BT, M - 1)[..., None], axis=1)
        return jnp.where((slot_BT < M)[..., None], y_BTE, 0), sums

    if run_BT is None or T == 1:
        return one(0)
    first, last = one(0), jnp.max(run_BT)

    def step(total, run):
        new = lax.cond(run <= last, jax.checkpoint(one), lambda run: nothing, run)
        return jax.tree.map(jnp.add, total, new), None

    nothing = jax.tree.map(jnp.zeros_like, first)
    later = jnp.arange(1, T, dtype=jnp.int32)
    others = jax.checkpoint(lambda total: lax.scan(step, total, later)[0])
    return lax.cond(last > 0, others, lambda total: total, first)


def slots(x_BTD: Array, slot_BT: Array, max_length: int) -> tuple[Array, Array]:
    """Returns x_BMD, the tokens by slot and 0 elsewhere, and which of the M slots hold a token.

    slot_BT: each token's slot; tokens with `max_length` or more have none.
    """
    B, T, _ = x_BTD.shape
    row_B1, token_BT = jnp.arange(B)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
    empty_BM = jnp.full((B, max_length), -1, jnp.int32)
    index_BM = empty_BM.at[row_B1, slot_BT].set(jnp.broadcast_to(token_BT, (B, T)), mode="drop")
    x_BMD = jnp.take_along_axis(x_BTD, jnp.maximum(index_BM, 0)[..., None], axis=1)
    seen_BM = index_BM >= 0
    return jnp.where(seen_BM[..., None], x_BMD, 0), seen_BM


def places(
    name: str, x_BTD: Array, segment_ids_BT: Array | None, grid, max_length: int, layer
) -> tuple[int, Array]:
    """Returns M, and each token's place in its document, (B, T) int32, for a whole-document mixer.

    Without a grid M is max_length, and places count a document's tokens; with one, M is its number
    of tokens, and places are counted along it. name: the mixer's.

    Raises ValueError for a row without segment ids that the grid or max_length does not fit.
    """
    B, T, _ = x_BTD.shape
    if grid is None:
        if segment_ids_BT is None:
            check_length(name, T, max_length)
        return max_length, positions.token_positions(B, T, segment_ids_BT, None)
    grids.check_grid(name, grid, T, segment_ids_BT)
    coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, grid, layer)
    return math.prod(grid), grids.ravel(coordinates_BTA, grid)


def check_length(name: str, length: int, max_length: int) -> None:
    """Raises ValueError if a document may have more tokens than `max_length`."""
    if length > max_length:
        raise ValueError(
            f"{name}: a document of {length} tokens, and max_length is {max_length}, the number of "
            "positions that have weights: shorten the documents (config.data.seq_len for text), or "
            "set max_length in config.model.pattern"
        )


def check_options(name: str, implementation: str | None, **counts: int) -> None:
    """Raises ValueError for a count below 1, and for an implementation: there is one form only.

    name: the mixer's.
    """
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {option} must be at least 1; got {count}")
    if implementation is not None:
        raise ValueError(
            f"{name}: there is one form of it, so implementation {implementation!r} chooses "
            "nothing; leave it out"
        )
