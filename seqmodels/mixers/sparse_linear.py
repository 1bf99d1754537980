"""Sparse-linear attention: softmax over the blocks that matter, linear over all others."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import feature_maps, grids, layers, orders

MODES = ("both", "sparse_only", "linear_only")


class SparseLinear(base.WholeDocumentMixer):
    """Sparse-linear attention, SLA (Zhang et al., arXiv 2509.24006, section 4).

        o_t = sum_{s chosen} softmax_s(q_t . k_s / sqrt(K)) v_s + W_l l_t + b
        l_t = sum_{s not chosen} w_ts v_s / (sum_{s not chosen} w_ts + eps)
        w_ts = phi(q_t) . phi(k_s)

    q, k, v = W x, q and k rotated; y = W_o o. Blocks of C tokens are counted within documents. The
    blocks of keys whose mean k has the largest product with the mean q of t's block are chosen for
    t, the share `topk` of the document's blocks and at least one. (The code subtracts the
    document's mean from k first, which changes no order.) l is what is left of linear attention
    over the whole document when the chosen tokens are subtracted, in float32. W_l (K, K), shared by
    the heads, and b start at 0 and are float32; where every block is chosen there is no second
    term, and o is softmax attention. This follows the branch SLA-1 of the authors' code, which has
    no class of blocks that are skipped.

    The choice of blocks passes no gradient. It is applied as a mask on all T x T products, which
    saves no time yet: what it costs is softmax attention twice.

    Attributes:
      num_heads: H; K = V = D / H.
      block_size: C.
      topk: share of a document's blocks that are chosen, rounded down; 1 - sparsity.
      feature_map: phi, a name in `feature_maps` that is never negative and has no parameters.
      mode: "both" as above; "sparse_only" leaves the second term out; "linear_only" is o = l with
        no block chosen.
      eps: added to the sum of weights.
      rope_base: base of the rotary angles on the grid's axes; None leaves the rotation out.
    """

    num_heads: int = 4
    block_size: int = 64
    topk: float = 0.2
    feature_map: str = "softmax"
    mode: str = "both"
    eps: float = 1e-5
    rope_base: float | None = 10_000.0

    def _sizes(self) -> tuple[int, int]:
        """Returns H and K."""
        self.check_choice("mode", MODES)
        if self.block_size < 1 or not 0 < self.topk <= 1:
            raise ValueError(
                f"sparse_linear: block_size must be at least 1 and topk above 0 and at most 1; got "
                f"{self.block_size} and {self.topk}"
            )
        if not feature_maps.is_nonnegative(self.feature_map):
            raise ValueError(
                f"sparse_linear: feature map {self.feature_map!r} takes both signs, so the sum of "
                "weights may be zero; take one that is never negative"
            )
        return self.num_heads, self.width_per_head(self.num_heads)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        H, K = self._sizes()
        B, T, _ = x_BTD.shape
        grids.check_grid(base.name_of(self), self.grid, T, segment_ids_BT)
        q_BTHK, k_BTHK, v_BTHV = (self.project_heads(x_BTD, H, K, name) for name in "qkv")
        if self.rope_base is not None:
            place_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
            q_BTHK, k_BTHK = (grids.rope_nd(x, place_BTA, self.rope_base) for x in (q_BTHK, k_BTHK))
        choice, parts = None, []
        if self.mode != "linear_only":
            choice = choose_blocks(q_BTHK, k_BTHK, segment_ids_BT, self.block_size, self.topk)
            parts.append(chosen_softmax(q_BTHK, k_BTHK, v_BTHV, choice.chosen_BHTS))
        if self.mode != "sparse_only":
            parts.append(self._linear_part(q_BTHK, k_BTHK, v_BTHV, segment_ids_BT, choice))
        return self.merge_heads(functools.reduce(jnp.add, parts)), None

    def _linear_part(self, q_BTHK, k_BTHK, v_BTHV, segment_ids_BT, choice: "Choice | None"):
        """Returns W_l l + b where tokens are left to it, and l itself where none is chosen."""
        phi = feature_maps.FeatureMap(self.feature_map, name="feature_map")
        q_BTHF, k_BTHF = (phi(x.astype(jnp.float32)) for x in (q_BTHK, k_BTHK))
        l_BTHV = self._remainder(q_BTHF, k_BTHF, v_BTHV, segment_ids_BT, choice)
        if choice is not None:
            zeros, dtypes = (
                nn.initializers.zeros,
                {"dtype": jnp.float32, "param_dtype": jnp.float32},
            )
            linear_out = layers.dense(
                l_BTHV.shape[-1], "linear_out", axes=(None, None), kernel_init=zeros, **dtypes
            )
            l_BTHV = jnp.where(choice.others_BT[..., None, None], linear_out(l_BTHV), 0.0)
        return l_BTHV.astype(self.dtype)

    @nn.nowrap
    def _remainder(self, q_BTHF, k_BTHF, v_BTHV, segment_ids_BT, choice) -> Array:
        """Returns l_BTHV, linear attention over the tokens that are not chosen, in float32."""
        v_BTHV = v_BTHV.astype(jnp.float32)
        v_BTHV = jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1)
        # All tokens of the document, less the chosen ones; the last column is the sum of weights.
        sums_BTHV, _ = operators.document_sums(
            q_BTHF,
            k_BTHF,
            v_BTHV,
            scale=1.0,
            segment_ids=segment_ids_BT,
            implementation=self.implementation,
        )
        others_BT11 = jnp.ones((1, 1, 1, 1), bool)
        if choice is not None:
            sums_BTHV -= chosen_sums(q_BTHF, k_BTHF, v_BTHV, choice.chosen_BHTS)
            others_BT11 = choice.others_BT[..., None, None]
        # Where nothing is left over, its sum of weights is rounding and must not be divided by.
        weights_BTH1 = jnp.where(others_BT11, sums_BTHV[..., -1:] + self.eps, 1.0)
        return jnp.where(others_BT11, sums_BTHV[..., :-1], 0.0) / weights_BTH1


class Choice(NamedTuple):
    """Fields of the choice of blocks, as tokens.

    Attributes:
      chosen_BHTS: whether s is in a block that is chosen for t.
      others_BT: whether t's document has blocks that are not chosen.
    """

    chosen_BHTS: Array
    others_BT: Array


def choose_blocks(
    q_BTHK: Array, k_BTHK: Array, segment_ids_BT: Array | None, block_size: int, topk: float
) -> Choice:
    """Chooses for each block of queries the share `topk` of its document's blocks of keys.

    Blocks have `block_size` tokens, counted from the document's start, and are compared by the
    products of their mean q and mean k. At least one block is chosen.
    """
    B, T = q_BTHK.shape[:2]
    block_BT = orders.group_ids(B, T, segment_ids_BT, block_size)
    block_BT -= block_BT[:, :1]
    document_BT = jnp.zeros_like(block_BT)
    if segment_ids_BT is not None:
        document_BT = operators.run_index(segment_ids_BT)
    arrays = *lax.stop_gradient((q_BTHK, k_BTHK)), block_BT, document_BT

    # A row has about T / block_size blocks, but as many as tokens where documents are short.
    few = -(-T // block_size)
    if segment_ids_BT is None or few == T:
        return _choose(few, topk, *arrays)
    choices = (functools.partial(_choose, N, topk) for N in (few, T))
    return lax.cond(jnp.max(block_BT) < few, *choices, *arrays)


def _choose(N: int, topk: float, q_BTHK, k_BTHK, block_BT, document_BT) -> Choice:
    """Returns the Choice of rows of at most N blocks."""
    in_block_BTN = block_BT[..., None] == jnp.arange(N, dtype=jnp.int32)[None, None]
    document_BN = jnp.max(jnp.where(in_block_BTN, document_BT[..., None], -1), axis=1)
    # Means over the tokens of each block.
    count_BN = jnp.sum(in_block_BTN, axis=1)
    share_BTN = in_block_BTN / jnp.maximum(count_BN, 1)[:, None].astype(jnp.float32)
    q_BNHK, k_BNHK = (
        jnp.einsum("BTN,BTHK->BNHK", share_BTN, x.astype(jnp.float32)) for x in (q_BTHK, k_BTHK)
    )
    scores_BHNM = jnp.einsum("BNHK,BMHK->BHNM", q_BNHK, k_BNHK)
    # Ranks among the blocks of the same document, equal scores in their order.
    same_BNM = (document_BN[:, :, None] == document_BN[:, None]) & (document_BN >= 0)[:, None]
    scores_BHNM = jnp.where(same_BNM[:, None], scores_BHNM, -jnp.inf)
    rank_BHNM = jnp.argsort(jnp.argsort(-scores_BHNM, axis=-1, stable=True), axis=-1)
    blocks_BN = jnp.sum(same_BNM, axis=-1)
    wanted_BN = jnp.floor(topk * blocks_BN + 1e-4).astype(jnp.int32)  # 0.3 * 10 is 3
    wanted_BN = jnp.maximum(wanted_BN, 1)
    chosen_BHNM = (rank_BHNM < wanted_BN[:, None, :, None]) & same_BNM[:, None]
    # From blocks to their tokens.
    rows_BHTM = jnp.take_along_axis(chosen_BHNM, block_BT[:, None, :, None], axis=2)
    chosen_BHTS = jnp.take_along_axis(rows_BHTM, block_BT[:, None, None], axis=3)
    others_BT = jnp.take_along_axis(wanted_BN < blocks_BN, block_BT, axis=1)
    return Choice(chosen_BHTS, others_BT)


@jax.checkpoint
def chosen_softmax(q_BTHK: Array, k_BTHK: Array, v_BTHV: Array, chosen_BHTS: Array) -> Array:
    """Returns softmax attention of each token over the tokens chosen for it, (B, T, H, V)."""
    logits_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK, preferred_element_type=jnp.float32)
    lowest = jnp.finfo(logits_BHTS.dtype).min
    logits_BHTS = jnp.where(chosen_BHTS, logits_BHTS * q_BTHK.shape[-1] ** -0.5, lowest)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(v_BTHV.dtype)
    return jnp.einsum("BHTS,BSHV->BTHV", weights_BHTS, v_BTHV)


@jax.checkpoint
def chosen_sums(q_BTHF: Array, k_BTHF: Array, v_BTHV: Array, chosen_BHTS: Array) -> Array:
    """Returns sum_{s chosen for t} (q_t . k_s) v_s, (B, T, H, V)."""
    weights_BHTS = jnp.einsum("BTHF,BSHF->BHTS", q_BTHF, k_BTHF)
    weights_BHTS = jnp.where(chosen_BHTS, weights_BHTS, 0)
    return jnp.einsum("BHTS,BSHV->BTHV", weights_BHTS, v_BTHV)
