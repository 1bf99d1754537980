"""LoLCATs: softmax attention in a window, and linear attention to all tokens before it."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import attention
from seqmodels.modules import attention_maps, feature_maps, layers, positions


@flax.struct.dataclass
class State:
    """Fields of LoLCATs' state: linear attention's matrix, and S slots for the window's tokens.

    Attributes:
      S_BHFV: sum of phi(k_n) [v_n, 1]^T over the tokens before the window.
      k_BSGK, v_BSGV: rotated keys, and values, of the last S = window tokens, oldest first.
      filled_BS: whether a slot holds a token of the current document.
      next_position_B: position of the next token in its document.
    """

    S_BHFV: Array
    k_BSGK: Array
    v_BSGV: Array
    filled_BS: Array
    next_position_B: Array


class LoLCATs(attention.LinearizedAttention):
    """LoLCATs on a softmax layer (Zhang et al., arXiv 2410.10254, section 3.2 and eq. 7).

        o_m = (sum_n a_mn v_n) / (sum_n a_mn)
        a_mn = g exp(q_m . k_n / sqrt(K) - c_m)     for the `window` latest n, m among them
        a_mn = phi_q(q_m) . phi_k(k_n)              for those before

    c_m is the largest exponent of the softmax part. As published, it scales that part only, so that
    the ratio of the two parts' weights depends on it. q, k, v, W_o and their options are those of
    `attention.Attention`; phi is applied after the rotation, with one matrix per query head; g =
    sigmoid(factor) per head.

    Where the collection "intermediates" is mutable the mixer sows, each (B, T) and a mean over
    heads, "attention_map": the cross-entropy of the weights a_mn relative to softmax attention's
    (`attention_maps.cross_entropy`), and "attention_map_kl": their KL divergence.

    Attributes:
      window: None leaves the softmax part out: Hedgehog (arXiv 2402.04347).
      feature_map, features: `feature_maps`, never negative; features None is K.
      factor_init: of the factor; -2.1972 is g = 0.1.
      eps: added to the denominator without a window.
    """

    window: int | None = 64
    feature_map: str = "hedgehog_softmax"
    features: int | None = None
    factor_init: float = -2.1972
    eps: float = 1e-12

    def _sizes(self):
        self._check_nonnegative(self.feature_map)
        return super()._sizes()

    def _map(self, name: str) -> feature_maps.FeatureMap:
        return feature_maps.FeatureMap(self.feature_map, self.features, name=f"{name}_map")

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        B, T, _ = x_BTD.shape
        if state is None:
            state = LoLCATs.init_state(self, B)
        q_BTHK, k_BTGK, v_BTGV = self._queries_keys_values(x_BTD)
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        q_BTHK, k_BTGK = (self._rotate(x, position_BT) for x in (q_BTHK, k_BTGK))
        o_BTHV, state = self._mixed(q_BTHK, k_BTGK, v_BTGV, position_BT, segment_ids_BT, state)
        return self._output(x_BTD, o_BTHV), state

    def _mixed(self, q_BTHK, k_BTGK, v_BTGV, position_BT, segment_ids_BT, state):
        (B, T, H, _), w = q_BTHK.shape, self.window or 0
        run_BT = jnp.zeros((B, T), jnp.int32)
        if segment_ids_BT is not None:
            run_BT = operators.run_index(segment_ids_BT)
        # Along S: the w tokens before, then these. Token t is at t + w; that at t leaves.
        k_BSGK, v_BSGV, filled_BS, run_BS = (
            jnp.concatenate([before, now], axis=1)
            for before, now in (
                (state.k_BSGK, k_BTGK.astype(self.dtype)),
                (state.v_BSGV, v_BTGV.astype(self.dtype)),
                (state.filled_BS, jnp.ones((B, T), bool)),
                (jnp.zeros((B, w), jnp.int32), run_BT),  # slots are of the first token's document
            )
        )

        # The linear part's token enters as it leaves the window.
        phi_q, phi_k = self._map("q"), self._map("k")
        phi_q_BTHF = phi_q(q_BTHK)
        enters_BT = filled_BS[:, :T] & (run_BS[:, :T] == run_BT)
        phi_k_BTHF = phi_k(self._of_all_heads(k_BSGK[:, :T])) * enters_BT[..., None, None]
        v_BTHV = self._of_all_heads(v_BSGV[:, :T])
        sums_BTHV, S_BHFV = operators.linear_attention(
            phi_q_BTHF,
            phi_k_BTHF,
            jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1),
            scale=1.0,
            **self.recurrence_keywords(state.S_BHFV, segment_ids_BT),
        )
        sums_BTHV = sums_BTHV.astype(jnp.float32)
        factor_H = None
        if w:
            init = nn.initializers.constant(self.factor_init)
            factor_H = jax.nn.sigmoid(layers.gate_parameter(self, "factor", init, (H,)))
            near_BTHV = window_sums(q_BTHK, k_BSGK, v_BSGV, filled_BS, run_BS, w)
            sums_BTHV = sums_BTHV + factor_H[None, None, :, None] * near_BTHV
        o_BTHV = sums_BTHV[..., :-1] / (sums_BTHV[..., -1:] + (0.0 if w else self.eps))
        if not self.is_initializing() and self.is_mutable_collection("intermediates"):
            if w:
                phi_k_BTHF = phi_k(self._of_all_heads(k_BTGK))
            maps = attention_maps.cross_entropy(
                q_BTHK, k_BTGK, phi_q_BTHF, phi_k_BTHF, segment_ids_BT,
                window=self.window, factor_H=factor_H,
            )  # fmt: skip
            cross_BT, own_BT = (jnp.mean(x_BTH, axis=-1) for x_BTH in maps)
            self.sow("intermediates", "attention_map", cross_BT)
            self.sow("intermediates", "attention_map_kl", cross_BT - own_BT)
        return o_BTHV.astype(self.dtype), State(
            S_BHFV,
            k_BSGK[:, T:],
            v_BSGV[:, T:],
            filled_BS[:, T:] & (run_BS[:, T:] == run_BT[:, -1:]),
            position_BT[:, -1] + 1,
        )

    def init_state(self, batch):
        H, G, K = self._sizes()
        F = feature_maps.output_dim(self.feature_map, K, self.features)
        slots = self.window or 0
        return State(
            S_BHFV=jnp.zeros((batch, H, F, K + 1), jnp.float32),
            k_BSGK=jnp.zeros((batch, slots, G, K), self.dtype),
            v_BSGV=jnp.zeros((batch, slots, G, K), self.dtype),
            filled_BS=jnp.zeros((batch, slots), bool),
            next_position_B=jnp.zeros((batch,), jnp.int32),
        )


def window_sums(
    q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, filled_BS: Array, run_BS: Array, window: int
) -> Array:
    """Computes the softmax sums of a sliding window, sum_n exp(q_t . k_n / sqrt(K) - c_t) [v_n, 1].

    n runs over the `window` latest tokens of t's document, t included; c_t is the largest exponent.
    Returns float32 (B, T, H, V + 1). Queries are processed in blocks of `window`, each with the two
    blocks of keys that it can see: memory and time are O(T * window).

    k_BSGK, v_BSGV: keys and values of the `window` tokens before the queries, then of the queries'
      own tokens: S = window + T.
    filled_BS: whether a slot holds a token. run_BS: each token's document number.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    C = min(window, T)
    N = -(-T // C)
    q_BTHK = jnp.pad(q_BTHK, ((0, 0), (0, N * C - T), (0, 0), (0, 0)))
    q_BNCGRK = q_BTHK.reshape(B, N, C, G, H // G, K).astype(jnp.float32)
    index_NS = jnp.minimum(
        C * jnp.arange(N)[:, None] + jnp.arange(C + window)[None], window + T - 1
    )
    k_BNSGK, v_BNSGV, filled_BNS, run_BNS = (
        x[:, index_NS] for x in (k_BSGK, v_BSGV, filled_BS, run_BS)
    )
    ahead_CS = jnp.arange(C + window)[None] - jnp.arange(C)[:, None]  # S less the query's first key
    near_CS = (ahead_CS >= 1) & (ahead_CS <= window)
    same_BNCS = run_BNS[:, :, None] == run_BNS[:, :, window:, None]
    seen_BNCS = near_CS[None, None] & same_BNCS & filled_BNS[:, :, None]
    logits = jnp.einsum("bncgrk,bnsgk->bngrcs", q_BNCGRK, k_BNSGK.astype(jnp.float32)) * K**-0.5
    logits = jnp.where(seen_BNCS[:, :, None, None], logits, -jnp.inf)  # a query always sees itself
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    v_BNSGV = v_BNSGV.astype(jnp.float32)
    v_BNSGV = jnp.concatenate([v_BNSGV, jnp.ones_like(v_BNSGV[..., :1])], axis=-1)
    sums = jnp.einsum("bngrcs,bnsgv->bncgrv", weights, v_BNSGV)
    return sums.reshape(B, N * C, H, -1)[:, :T]
