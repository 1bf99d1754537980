"""Softmax attention: the baseline, and the minority layer of hybrids."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import norms, operators, positions
from seqmodels.array_typing import Array
from seqmodels.mixers import base


@flax.struct.dataclass
class KeyValueCache:
    """The keys (after rotation) and values that later tokens may still see.

    position_BS: a slot's place in its document; -1 marks an empty slot.
    next_position_B: the place of the next token in its document.
    slots_filled: slots written so far, for full attention (a window shifts instead).
    """

    k_BSGK: Array
    v_BSGK: Array
    position_BS: Array
    next_position_B: Array
    slots_filled: Array


class Attention(base.Mixer):
    """o_t = W_o softmax(q_t . k_s / sqrt(K)) v_s over s <= t, rotary positions (arXiv 1706.03762, 2104.09864).

    num_heads, num_kv_heads: H query heads in G key/value groups; G = 1 is multi-query, None is H.
    head_dim: K; None is D / H.
    window: a token sees itself and window-1 tokens before it; None sees all, and then the cache holds
      `max_length` tokens: decoding past it is the caller's error (`experiments.generate` checks).
    rope_base: None leaves positions out.
    qk_norm: RMS norm on each head's q and k before the rotation.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    max_length: int = 2048
    rope_base: float | None = 10_000.0
    qk_norm: bool = False
    use_bias: bool = False

    def _sizes(self) -> tuple[int, int, int]:
        H, G = self.num_heads, self.num_kv_heads or self.num_heads
        if H % G:
            raise ValueError(f"attention: num_kv_heads {G} must divide num_heads {H}")
        if self.head_dim is None and self.d_model % H:
            raise ValueError(
                f"attention: num_heads {H} must divide d_model {self.d_model}, or set head_dim"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"attention: window must be at least 1 (the token itself); got {self.window}"
            )
        return H, G, self.head_dim or self.d_model // H

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, G, K = self._sizes()
        B, T, _ = x_BTD.shape
        q_BTHK = self.project_heads(x_BTD, H, K, "q", use_bias=self.use_bias)
        k_BTGK = self.project_heads(x_BTD, G, K, "k", use_bias=self.use_bias)
        v_BTGK = self.project_heads(x_BTD, G, K, "v", use_bias=self.use_bias)
        if self.qk_norm:
            q_BTHK = norms.RMSNorm(name="q_norm")(q_BTHK)
            k_BTGK = norms.RMSNorm(name="k_norm")(k_BTGK)
        offset_B = None if state is None else state.next_position_B
        position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
        if self.rope_base is not None:
            q_BTHK = positions.rope(q_BTHK, position_BT, self.rope_base)
            k_BTGK = positions.rope(k_BTGK, position_BT, self.rope_base)
        new = (k_BTGK, v_BTGK, position_BT, segment_ids_BT)
        if state is None:
            _, state = self._extend(self.init_state(B), *new)
            seen = {"k_BTGK": k_BTGK, "v_BTGV": v_BTGK, "segment_ids": segment_ids_BT}
        else:
            seen, state = self._extend(state, *new)
            seen["q_positions_BT"] = position_BT
        o_BTHK = operators.softmax_attention(
            q_BTHK, **seen, window=self.window, implementation=self.implementation
        )
        return self.merge_heads(o_BTHK, use_bias=self.use_bias), state

    def _extend(self, cache: KeyValueCache, k_BTGK, v_BTGK, position_BT, segment_ids_BT):
        """Adds new tokens to the cache. Returns what these tokens may look at, and the cache after them."""
        B, T = position_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros((B, T), jnp.int32)
        # Slots hold tokens of the first token's document only: it has run index 0.
        run_BT = operators.run_index(segment_ids_BT)
        run_BS = jnp.zeros_like(cache.position_BS)
        old = (cache.k_BSGK, cache.v_BSGK, cache.position_BS, run_BS)
        new = (k_BTGK.astype(self.dtype), v_BTGK.astype(self.dtype), position_BT, run_BT)
        if self.window is None:
            slots = [_write(a, b, cache.slots_filled) for a, b in zip(old, new)]
            kept = slots
        else:
            slots = [jnp.concatenate([a, b], axis=1) for a, b in zip(old, new)]
            kept = [a[:, T:] for a in slots]
        seen = dict(zip(("k_BTGK", "v_BTGV", "kv_positions_BS", "kv_segment_ids_BS"), slots))
        seen["segment_ids"] = run_BT
        k_BSGK, v_BSGK, position_BS, run_BS = kept
        cache = KeyValueCache(
            k_BSGK,
            v_BSGK,
            position_BS=jnp.where(run_BS == run_BT[:, -1:], position_BS, -1),
            next_position_B=position_BT[:, -1] + 1,
            slots_filled=cache.slots_filled + T,
        )
        return seen, cache

    def init_state(self, batch):
        _, G, K = self._sizes()
        slots = self.max_length if self.window is None else self.window - 1
        return KeyValueCache(
            k_BSGK=jnp.zeros((batch, slots, G, K), self.dtype),
            v_BSGK=jnp.zeros((batch, slots, G, K), self.dtype),
            position_BS=jnp.full((batch, slots), -1, jnp.int32),
            next_position_B=jnp.zeros((batch,), jnp.int32),
            slots_filled=jnp.zeros((), jnp.int32),
        )


def _write(slots, new, start):
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=1)
