"""TransNormer's local layers: attention inside blocks that do not overlap."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.mixers.transnormer import NORMS, OUTPUT_INIT, QKV_INIT
from seqmodels.modules import positions

VARIANTS = ("t1", "t2")


@flax.struct.dataclass
class State:
    """Fields of block-local attention's state: S = block_size slots, one per earlier token.

    Attributes:
      k_BSHK, v_BSHK: keys and values of the last S tokens, oldest first.
      position_BS: position in its document of the token in each slot; -1 marks a slot that no later
        token may see.
      next_position_B: position of the next token in its document.
    """

    k_BSHK: Array
    v_BSHK: Array
    position_BS: Array
    next_position_B: Array


class TransNormerLocal(base.Mixer):
    """TransNormer's DiagAttention, inside blocks (Qin et al., arXiv 2210.10340, section 4.2).

        o_t = sum_s w_ts v_s over s <= t in t's block
        y_t = W_o Norm(o_t)

    q, k, v = W x + b; W_o has a bias, too. The norm is over all heads together. Weights start
    Xavier uniform, those of q, k and v with gain 1/sqrt(2).

    Attributes:
      num_heads: H; K = V = D / H.
      block_size: tokens per block; blocks are counted from the start of each document.
      variant: "t1" has w_ts = relu(q_t . k_s / sqrt(K)), not normalised; "t2" has w_ts =
        softmax_s(q_t . k_s / sqrt(K)).
      norm: a name of `norms.NORMS`, or "gated_rms_norm".
    """

    num_heads: int = 4
    block_size: int = 64
    variant: str = "t2"
    norm: str = "layer_norm"

    def _sizes(self) -> tuple[int, int]:
        if self.block_size < 1:
            raise ValueError(
                f"transnormer_local: block_size must be at least 1; got {self.block_size}"
            )
        if self.implementation is not None:
            raise ValueError(
                f"transnormer_local: there is one form of it, so implementation "
                f"{self.implementation!r} chooses nothing; leave it out"
            )
        self.check_choice("variant", VARIANTS)
        self.check_choice("norm", NORMS)
        return self.num_heads, self.width_per_head(self.num_heads)

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        H, K = self._sizes()
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        q_BTHK, k_BTHK, v_BTHK = (
            self.project_heads(x_BTD, H, K, name, use_bias=True, kernel_init=QKV_INIT)
            for name in "qkv"
        )
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros((B, T), jnp.int32)
        run_BT = operators.run_index(segment_ids_BT)
        # The slots hold tokens of the first token's document: run 0.
        old = (state.k_BSHK, state.v_BSHK, state.position_BS, jnp.zeros_like(state.position_BS))
        new = (k_BTHK, v_BTHK, position_BT, run_BT)
        arrays = {"q_BTHK": (q_BTHK, "BTHK")}
        for name, a, b in zip(("k", "v", "position", "run"), old, new):
            letters = "HK"[: 2 * (a.ndim > 2)]
            arrays[f"{name}_BS"] = (a, f"BS{letters}")
            arrays[f"{name}_BT"] = (b, f"BT{letters}")
        o_BTHK = operators.on_parts(self._attend, arrays, "BTHK")
        o_BTD = NORMS[self.norm](name="o_norm")(o_BTHK.reshape(x_BTD.shape))
        y_BTD = self.merge_heads(o_BTD, use_bias=True, kernel_init=OUTPUT_INIT)
        slots = (jnp.concatenate([a, b], axis=1)[:, T:] for a, b in zip(old, new))
        k_BSHK, v_BSHK, position_BS, run_BS = slots
        position_BS = jnp.where(run_BS == run_BT[:, -1:], position_BS, -1)
        return y_BTD, State(k_BSHK, v_BSHK, position_BS, position_BT[:, -1] + 1)

    @nn.nowrap
    def _attend(self, axis_name, q_BTHK, **slots):
        """Returns o_BTHK of this shard's queries; w is block_size.

        Keys, values, positions and document numbers come in pairs: name_BS of the w tokens before
        the row, name_BT of this shard's tokens. Queries are processed C at a time with their own C
        tokens and the w before those. Blocks may start anywhere in such a chunk, since documents
        do; a mask keeps the tokens of the query's own block.
        """
        B, T, H, K = q_BTHK.shape
        w = self.block_size
        k_BSHK, v_BSHK, position_BS, run_BS = (
            operators.with_earlier(axis_name, slots[f"{name}_BS"], slots[f"{name}_BT"])
            for name in ("k", "v", "position", "run")
        )
        position_BT, run_BT = position_BS[:, w:], run_BS[:, w:]
        C = min(w, T)
        N = -(-T // C)

        def pad(x_BT, fill=0):
            widths = ((0, 0), (0, N * C - T)) + ((0, 0),) * (x_BT.ndim - 2)
            return jnp.pad(x_BT, widths, constant_values=fill)

        def chunks(x_BT):
            return pad(x_BT).reshape(B, N, C, *x_BT.shape[2:])

        # Each chunk's slots, and which of them a query sees: same document, same block, not later.
        slot_NS = C * jnp.arange(N)[:, None] + jnp.arange(w + C)[None]
        k_BNSHK, v_BNSHK, run_BNS = (pad(x)[:, slot_NS] for x in (k_BSHK, v_BSHK, run_BS))
        position_BNS = pad(position_BS, -1)[:, slot_NS]
        position_BNC = chunks(position_BT)
        same_BNCS = chunks(run_BT)[..., None] == run_BNS[:, :, None]
        same_BNCS &= (position_BNC // w)[..., None] == (position_BNS // w)[:, :, None]
        seen_BNCS = same_BNCS & (position_BNC[..., None] >= position_BNS[:, :, None])
        # Weights, relu or softmax of the logits, and their sums of v.
        logits_BNHCS = jnp.einsum(
            "BNCHK,BNSHK->BNHCS",
            chunks(q_BTHK) * K**-0.5,
            k_BNSHK,
            preferred_element_type=jnp.float32,
        )
        seen_BNHCS = seen_BNCS[:, :, None]
        if self.variant == "t1":
            weights_BNHCS = jnp.where(seen_BNHCS, jax.nn.relu(logits_BNHCS), 0.0)
        else:
            lowest = jnp.finfo(jnp.float32).min
            weights_BNHCS = jax.nn.softmax(jnp.where(seen_BNHCS, logits_BNHCS, lowest), axis=-1)
        o_BNCHK = jnp.einsum("BNHCS,BNSHK->BNCHK", weights_BNHCS.astype(self.dtype), v_BNSHK)
        return o_BNCHK.reshape(B, N * C, H, K)[:, :T]

    def init_state(self, batch):
        H, K = self._sizes()
        shape_BSHK = (batch, self.block_size, H, K)
        return State(
            k_BSHK=jnp.zeros(shape_BSHK, self.dtype),
            v_BSHK=jnp.zeros(shape_BSHK, self.dtype),
            position_BS=jnp.full(shape_BSHK[:2], -1, jnp.int32),
            next_position_B=jnp.zeros((batch,), jnp.int32),
        )
