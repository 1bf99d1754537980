"""Softmax attention with rotary positions: the baseline, and some layers of hybrid models."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import feature_maps, layers, norms, positions


@flax.struct.dataclass
class KeyValueCache:
    """Fields of attention's decoding state: S slots, each with an earlier token's key and value.

    Attributes:
      k_BSGK, v_BSGK: keys, after rotation, and values.
      position_BS: position in its document of the token in each slot; -1 marks an empty slot.
      next_position_B: position of the next token in its document.
      slots_filled: number of tokens written so far; full attention writes the next one there, and
        attention with a window shifts its slots instead.
    """

    k_BSGK: Array
    v_BSGK: Array
    position_BS: Array
    next_position_B: Array
    slots_filled: Array


class Attention(base.Mixer):
    """Softmax attention (Vaswani et al., arXiv 1706.03762, eq. 1) with rotary positions.

        o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s

    q, k, v = W x, q and k rotated (arXiv 2104.09864, eq. 34); y = W_o o.

    Attributes:
      num_heads, num_kv_heads: H query heads in G key/value groups; G = 1 is multi-query, None is H.
      head_dim: K; None is D / H.
      window: number of tokens that each token sees, itself and those before it; None is all.
      max_length: tokens that the decoding state holds without a window. A caller must not decode
        past it (`sampling.check_length` checks).
      rope_base: base of the rotary angles, base^(-2i/K) per token; None leaves the rotation out.
      rope_fraction: the share of each head's channels that is rotated.
      rope_scaling: how angles are scaled for long contexts, as in `positions.frequencies`.
      qk_norm: True norms each head's q and k by RMSNorm before the rotation; a name of
        `norms.NORMS` chooses another norm.
      norm_eps: epsilon of the norms of q and k.
      use_bias: whether the projections have biases.
      o_bias: whether W_o has a bias; None is use_bias.
      output_gate: whether y = W_o (o * sigmoid(W_g x)) (arXiv 2505.06708).
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    max_length: int = 2048
    rope_base: float | None = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: tuple | None = None
    qk_norm: bool | str = False
    norm_eps: float = 1e-5
    use_bias: bool = False
    o_bias: bool | None = None
    output_gate: bool = False

    def _sizes(self) -> tuple[int, int, int]:
        H, G = self.num_heads, self.num_kv_heads or self.num_heads
        if H % G:
            raise ValueError(f"attention: num_kv_heads {G} must divide num_heads {H}")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"attention: window must be at least 1 (the token itself); got {self.window}"
            )
        if not isinstance(self.qk_norm, bool):
            self.check_choice("qk_norm", norms.NORMS)
        return H, G, self.head_dim or self.width_per_head(H)

    @nn.compact
    def __call__(
        self, x_BTD, segment_ids_BT=None, state=None, *, layer=None
    ) -> tuple[Array, base.State]:
        B, T, _ = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGK = self._queries_keys_values(x_BTD)
        offset_B = None if state is None else state.next_position_B
        position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
        q_BTHK, k_BTGK = (self._rotate(x, position_BT) for x in (q_BTHK, k_BTGK))
        o_BTHK, state = self._attend(q_BTHK, k_BTGK, v_BTGK, position_BT, segment_ids_BT, state)
        return self._output(x_BTD, o_BTHK), state

    def _queries_keys_values(self, x_BTD):
        """Projects x to q, k and v, normed where `qk_norm` and not yet rotated."""
        H, G, K = self._sizes()
        q_BTHK = self.project_heads(x_BTD, H, K, "q", use_bias=self.use_bias)
        k_BTGK = self.project_heads(x_BTD, G, K, "k", use_bias=self.use_bias)
        v_BTGK = self.project_heads(x_BTD, G, K, "v", use_bias=self.use_bias)
        if self.qk_norm:
            norm = norms.NORMS["rms_norm" if self.qk_norm is True else self.qk_norm]
            q_BTHK = norm(eps=self.norm_eps, name="q_norm")(q_BTHK)
            k_BTGK = norm(eps=self.norm_eps, name="k_norm")(k_BTGK)
        return q_BTHK, k_BTGK, v_BTGK

    def _rotate(self, x_BTHK, position_BT):
        if self.rope_base is None:
            return x_BTHK
        return positions.rope(
            x_BTHK, position_BT, self.rope_base, self.rope_fraction, self.rope_scaling
        )

    def _attend(self, q_BTHK, k_BTGK, v_BTGK, position_BT, segment_ids_BT, state):
        """Returns the attention output o_BTHK and the KeyValueCache after these tokens.

        Queries see these tokens and those that `state`, a KeyValueCache or None, holds.
        """
        new = (k_BTGK, v_BTGK, position_BT, segment_ids_BT)
        if state is None:
            # Tokens without a state may be more than a cache holds; then it is as long as they are.
            _, state = self._extend(self._empty(*position_BT.shape), *new)
            seen: dict[str, Any] = {
                "k_BTGK": k_BTGK,
                "v_BTGV": v_BTGK,
                "segment_ids": segment_ids_BT,
            }
        else:
            seen, state = self._extend(state, *new)
            seen["q_positions_BT"] = position_BT
        o_BTHK = operators.softmax_attention(
            q_BTHK, **seen, window=self.window, implementation=self.implementation
        )
        return o_BTHK, state

    def _output(self, x_BTD, o_BTHK):
        if self.output_gate:
            _, H, K = o_BTHK.shape[1:]
            g_BTHK = self.project_heads(x_BTD, H, K, "g", use_bias=self.use_bias)
            o_BTHK = layers.gated(o_BTHK, g_BTHK, jax.nn.sigmoid)
        o_bias = self.use_bias if self.o_bias is None else self.o_bias
        return self.merge_heads(o_BTHK, use_bias=o_bias)

    def _extend(self, cache: KeyValueCache, k_BTGK, v_BTGK, position_BT, segment_ids_BT):
        """Adds new tokens to a KeyValueCache.

        Returns the keywords of `operators.softmax_attention` by which the new tokens' queries see
        all slots and each other, and the new cache.
        """
        B, T = position_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros((B, T), jnp.int32)
        # Slots hold tokens of the first token's document only: it has run index 0.
        run_BT = operators.run_index(segment_ids_BT)
        run_BS = jnp.zeros_like(cache.position_BS)
        old = (cache.k_BSGK, cache.v_BSGK, cache.position_BS, run_BS)
        new = (k_BTGK.astype(self.dtype), v_BTGK.astype(self.dtype), position_BT, run_BT)
        # Full attention writes behind the filled slots; a window drops as many slots as come.
        if self.window is None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            slots = [write(a, b, cache.slots_filled) for a, b in zip(old, new)]
            kept = slots
        else:
            slots = [jnp.concatenate([a, b], axis=1) for a, b in zip(old, new)]
            kept = [a[:, T:] for a in slots]
        names = ("k_BTGK", "v_BTGV", "kv_positions_BS", "kv_segment_ids_BS")
        seen = dict(zip(names, slots), segment_ids=run_BT)
        k_BSGK, v_BSGK, position_BS, run_BS = kept
        cache = KeyValueCache(
            k_BSGK,
            v_BSGK,
            position_BS=jnp.where(run_BS == run_BT[:, -1:], position_BS, -1),
            next_position_B=position_BT[:, -1] + 1,
            slots_filled=cache.slots_filled + T,
        )
        return seen, cache

    def init_state(self, batch) -> base.State:
        return Attention._empty(self, batch)

    def _empty(self, batch, tokens=0):
        _, G, K = self._sizes()
        slots = max(self.max_length, tokens) if self.window is None else self.window - 1
        return KeyValueCache(
            k_BSGK=jnp.zeros((batch, slots, G, K), self.dtype),
            v_BSGK=jnp.zeros((batch, slots, G, K), self.dtype),
            position_BS=jnp.full((batch, slots), -1, jnp.int32),
            next_position_B=jnp.zeros((batch,), jnp.int32),
            slots_filled=jnp.zeros((), jnp.int32),
        )


class LinearizedAttention(Attention, base.ChunkedMixer):
    """A recurrence on a softmax layer's projections: the base of linearized students."""

    @nn.nowrap
    def _check_nonnegative(self, feature_map: str) -> None:
        """Raises ValueError for a feature map whose sum of weights cannot be divided by."""
        if not feature_maps.is_nonnegative(feature_map):
            raise ValueError(
                f"{base.name_of(self)}: feature map {feature_map!r} takes both signs, so the sum "
                "of weights may be zero; take one that is never negative"
            )

    @nn.nowrap
    def _of_all_heads(self, x_BTGK: Array) -> Array:
        """Repeats what query heads share, (B, T, G, ...) to (B, T, H, ...)."""
        return jnp.repeat(x_BTGK, self.num_heads // x_BTGK.shape[2], axis=2)
