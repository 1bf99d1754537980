"""The mask of softmax attention: one rule for training on packed documents and for decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """The mask of an attention call. Query t sees key s if and only if all of these hold:

      s's slot is filled: kv_position >= 0;    causal: kv_position <= q_position;
      window: |q_position - kv_position| < window;    segments: q_segment == kv_segment.

    Positions are (B or 1, T) and (B or 1, S), segments too or None. `aligned`: token t is at index
    t of queries and of keys, so that blocks can be left out by their indices alone. `by_index`:
    positions are indices, and every slot is filled.
    """

    q_position_BT: jax.Array
    kv_position_BS: jax.Array
    q_segment_BT: jax.Array | None
    kv_segment_BS: jax.Array | None
    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    aligned: bool = dataclasses.field(metadata={"static": True})
    by_index: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self) -> jax.Array:
        """Returns the boolean mask (B or 1, T, S): whether query t sees key s."""
        age_BTS = self.q_position_BT[:, :, None] - self.kv_position_BS[:, None, :]
        seen_BTS = jnp.broadcast_to(self.kv_position_BS[:, None, :] >= 0, age_BTS.shape)
        if self.causal:
            seen_BTS &= age_BTS >= 0
        if self.window is not None:
            seen_BTS &= jnp.abs(age_BTS) < self.window
        if self.q_segment_BT is not None and self.kv_segment_BS is not None:
            seen_BTS &= self.q_segment_BT[:, :, None] == self.kv_segment_BS[:, None, :]
        return seen_BTS

    def padded(self, queries: int, keys: int) -> "Visibility":
        """Returns the mask after appending this many empty slots of queries and of keys."""

        def pad(x, count, value):
            return None if x is None else jnp.pad(x, ((0, 0), (0, count)), constant_values=value)

        return dataclasses.replace(
            self,
            q_position_BT=pad(self.q_position_BT, queries, 0),
            kv_position_BS=pad(self.kv_position_BS, keys, -1),
            q_segment_BT=pad(self.q_segment_BT, queries, 0),
            kv_segment_BS=pad(self.kv_segment_BS, keys, 0),
        )

    def block(self, first_query, queries: int, first_key, keys: int) -> "Visibility":
        """Returns the mask between a range of queries and a range of keys; starts may be traced."""

        def cut(x, start, size):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        return dataclasses.replace(
            self,
            q_position_BT=cut(self.q_position_BT, first_query, queries),
            kv_position_BS=cut(self.kv_position_BS, first_key, keys),
            q_segment_BT=cut(self.q_segment_BT, first_query, queries),
            kv_segment_BS=cut(self.kv_segment_BS, first_key, keys),
        )

    def blocks_seen(self, queries: int, keys: int) -> jax.Array | None:
        """Returns which blocks of queries and keys may have a visible pair, (N, M).

        queries, keys: the sizes of blocks. Only ranges of positions and documents are compared, so
          that a block called seen may hold no pair. None where `aligned`: there the blocks' indices
          tell.
        """
        if self.aligned:
            return None

        def ranges(x_BT, size, counts: Any = True):
            x_BNC = x_BT.reshape(x_BT.shape[0], -1, size)
            most = jnp.iinfo(x_BT.dtype).max
            low_BN = jnp.min(jnp.where(counts, x_BNC, most), axis=-1)
            return low_BN, jnp.max(jnp.where(counts, x_BNC, -1 - most), axis=-1)

        filled_BMC = self.kv_position_BS.reshape(self.kv_position_BS.shape[0], -1, keys) >= 0
        (q_low, q_high) = ranges(self.q_position_BT, queries)
        (kv_low, kv_high) = ranges(self.kv_position_BS, keys, filled_BMC)
        seen = jnp.any(filled_BMC, axis=-1)[:, None, :]
        if self.causal:
            seen &= kv_low[:, None, :] <= q_high[:, :, None]
        if self.window is not None:
            # No overflow where a block is empty: kv_low is the largest integer, kv_high the least
            seen &= q_low[:, :, None] - self.window < jnp.maximum(kv_high, -1)[:, None, :]
            seen &= kv_low[:, None, :] - self.window < q_high[:, :, None]
        if self.q_segment_BT is not None:
            (q_first, q_last) = ranges(self.q_segment_BT, queries)
            (kv_first, kv_last) = ranges(self.kv_segment_BS, keys, filled_BMC)
            seen &= q_first[:, :, None] <= kv_last[:, None, :]
            seen &= kv_first[:, None, :] <= q_last[:, :, None]
        return jnp.any(seen, axis=0)
