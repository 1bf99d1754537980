"""Linear attention with an affine correction of each row of weights: the one form of many systems.

InLine, MALA, RALA, NaLaFormer, SLAB, LiT, LinFusion and SANA-Video are this form with other
options, and each of their files is a table of those. Over whole documents it is
`AffineLinearAttention`; over the tokens so far it is `CausalAffineLinearAttention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base
from seqmodels.modules import feature_maps, grids, layers, norms, positions

GATES: dict[str, Callable[[Array], Array]] = {"identity": jax.nn.identity, "silu": jax.nn.silu}
LOCAL_TERMS = ("depthwise", "shared")

# ------------------------------------------------------------------ corrections of rows


def _none(r, n, scale, eps):
    return jnp.full_like(r, scale), None


def _over_sum(r, n, scale, eps):
    return 1.0 / (r + eps), None


def _over_mean(r, n, scale, eps):
    return 1.0 / (r + n * eps), None


def _mala(r, n, scale, eps):
    z = scale * r / n
    return (1.0 + 1.0 / (z + eps)) * scale / n, -z / n


def _inline(r, n, scale, eps):
    return jnp.full_like(r, scale) / n, (1.0 - scale * r / n) / n


# {name: (r_i = q_i . sum_j k_j, n tokens, scale s, eps) -> (a_i, b_i)}, of the weights of token i,
# a_i q_i . k_j + b_i. b None is 0.
CORRECTIONS: dict[str, Callable[..., tuple[Array, Array | None]]] = {
    "none": _none,  # s q_i . k_j
    "over_sum": _over_sum,  # q_i . k_j / (r_i + eps)
    "over_mean": _over_mean,  # q_i . k_j / (n (z_i + eps)), z_i = r_i / n
    "mala": _mala,  # ((1 + 1 / (z_i + eps)) s q_i . k_j - z_i) / n, z_i = s r_i / n
    "inline": _inline,  # (s q_i . k_j - z_i + 1) / n, z_i = s r_i / n
}
OFFSETS = ("inline", "mala")  # those that have b


@flax.struct.dataclass
class State:
    """Fields of the state of a form that reads tokens so far, all or block by block.

    Attributes:
      k_sum_BHF1: sum of the keys' features.
      S_BHFV: sum of k~ v^T, with sum v as a last row where the correction has an offset b.
      next_position_B: position of the next token in its document, the number of tokens so far.
    """

    k_sum_BHF1: Array
    S_BHFV: Array
    next_position_B: Array


class AffineMixer(base.Mixer):
    """Base class of both forms: projections, features, corrected sums, gate and output.

        o_i = a_i q~_i (sum_j k~_j v_j^T) + b_i sum_j v_j
        r_i = q_i . sum_j k_j

    q = phi_q(W_q x), k = phi_k(W_k x), v = W_v x; q~ and k~ are q and k turned by rotary positions,
    r is made before that; a and b are functions of r and the number of tokens. Features, sums and
    o are float32.

    Attributes:
      num_heads: H.
      head_dim: K and V; None is D / H.
      q_map, k_map: phi_q and phi_k, names in `feature_maps` of maps without parameters; k_map None
        is q_map.
      correction: what makes a and b, a name in `CORRECTIONS`.
      scale: s of the corrections that have it; None is K^-1/2.
      eps: added to denominators.
      rope_base: base of the rotary angles; None leaves the rotation out. Maps that make 2 K
        features are turned in pieces of K.
      rope_angles: a name in `grids.ANGLES`.
      gate: activation of a factor W_g x of o, a name in `GATES`; None leaves the factor out.
      output_norm: name in `norms.NORMS` of a norm over all channels of o, before the gate.
      use_bias: whether W_q, W_k, W_v and W_g have biases. output_bias: whether W_o has one.
    """

    num_heads: int = 4
    head_dim: int | None = None
    q_map: str = "elu_plus_one"
    k_map: str | None = None
    correction: str = "over_sum"
    scale: float | None = None
    eps: float = 1e-6
    rope_base: float | None = None
    rope_angles: str = "rope"
    gate: str | None = None
    output_norm: str | None = None
    use_bias: bool = False
    output_bias: bool = True

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int]:
        """Returns H, K and F."""
        maps = self.q_map, self.k_map or self.q_map
        K = self.head_dim or self.width_per_head(self.num_heads)
        widths = [feature_maps.output_dim(name, K) for name in maps]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{base.name_of(self)}: q_map {maps[0]!r} gives {widths[0]} features and k_map "
                f"{maps[1]!r} {widths[1]}; they must be equal"
            )
        self.check_choice("correction", CORRECTIONS)
        for option, choices in (("gate", GATES), ("output_norm", norms.NORMS)):
            if getattr(self, option) is not None:
                self.check_choice(option, choices)
        return self.num_heads, K, widths[0]

    def raw(self, x_BTD: Array, name: str, segment_ids_BT: Array | None, layer: Any) -> Array:
        """Returns queries (name "q") or keys ("k") before their map, heads side by side."""
        H, K, _ = self._sizes()
        return self.project(x_BTD, H * K, name, use_bias=self.use_bias)

    def features(self, x_BTD, segment_ids_BT, layer) -> tuple[Array, Array]:
        """Returns q and k (B, T, H, F) in float32 or wider."""
        H, K, _ = self._sizes()
        found = []
        for name, kind in (("q", self.q_map), ("k", self.k_map or self.q_map)):
            raw_BTE = self.raw(x_BTD, name, segment_ids_BT, layer)
            raw_BTHK = float32(raw_BTE).reshape(*raw_BTE.shape[:2], H, K)
            found.append(feature_maps.FeatureMap(kind, name=f"{name}_map")(raw_BTHK))
        return found[0], found[1]

    def values(self, x_BTD: Array) -> Array:
        """Returns v_BTHV in the mixer's dtype."""
        H, K, _ = self._sizes()
        return self.project_heads(x_BTD, H, K, "v", use_bias=self.use_bias)

    @nn.nowrap
    def corrected(
        self, read, q_BTHF, k_BTHF, v_BTHV, count_BTH1, coordinates_BTA, sums=(None, None)
    ):
        """Returns o_BTHV, and the sums it was read from: (sum k, sum k~ v^T).

        read: operator (q, k, v, initial_state) -> (q_i . sum_j k_j v_j^T, the sum for more tokens).
        count_BTH1: number of tokens that each token's sums run over. sums: those before the first
          token; None is zeros.
        """
        scale = self._sizes()[1] ** -0.5 if self.scale is None else self.scale
        one_BTH1 = jnp.ones_like(k_BTHF[..., :1])
        r_BTH1, k_sum = read(q_BTHF, k_BTHF, one_BTH1, initial_state=sums[0])
        a_BTH1, b_BTH1 = CORRECTIONS[self.correction](r_BTH1, count_BTH1, scale, self.eps)
        q_BTHF = a_BTH1 * self._turned(q_BTHF, coordinates_BTA)
        k_BTHF = self._turned(k_BTHF, coordinates_BTA)
        if b_BTH1 is not None:  # one more feature reads b_i sum_j v_j in the same pass
            q_BTHF = jnp.concatenate([q_BTHF, b_BTH1], axis=-1)
            k_BTHF = jnp.concatenate([k_BTHF, one_BTH1], axis=-1)
        o_BTHV, S_BHFV = read(q_BTHF, k_BTHF, float32(v_BTHV), initial_state=sums[1])
        return o_BTHV, (k_sum, S_BHFV)

    @nn.nowrap
    def no_sums(self, batch: int) -> State:
        """Returns the state before the first token."""
        H, K, F = self._sizes()
        k_sum_BHF1 = jnp.zeros((batch, H, F, 1), jnp.float32)
        S_BHFV = jnp.zeros((batch, H, F + (self.correction in OFFSETS), K), jnp.float32)
        return State(k_sum_BHF1, S_BHFV, jnp.zeros((batch,), jnp.int32))

    @nn.nowrap
    def _turned(self, x_BTHF: Array, coordinates_BTA: Array) -> Array:
        """Returns features turned by their positions, in pieces of K channels."""
        if self.rope_base is None:
            return x_BTHF
        K = self._sizes()[1]
        x_BTNK = x_BTHF.reshape(*x_BTHF.shape[:2], -1, K)
        turned = grids.rope_nd(x_BTNK, coordinates_BTA, self.rope_base, self.rope_angles)
        return turned.reshape(x_BTHF.shape)

    def output(self, o_BTE: Array, x_BTD: Array) -> Array:
        """Returns y_BTD = W_o (norm(o) * gate), of o with its heads side by side."""
        o_BTE = o_BTE.astype(self.dtype)
        if self.output_norm is not None:
            o_BTE = norms.NORMS[self.output_norm](name="o_norm")(o_BTE)
        if self.gate is not None:
            gate_BTE = self.project(x_BTD, o_BTE.shape[-1], "g", use_bias=self.use_bias)
            o_BTE = layers.gated(o_BTE, gate_BTE, GATES[self.gate])
        axes, bias = ("heads", "embed"), self.output_bias
        return self.project(o_BTE, self.d_model, "o", axes=axes, use_bias=bias)


class AffineLinearAttention(AffineMixer, base.WholeDocumentMixer):
    """Linear attention over whole documents (Katharopoulos et al., arXiv 2006.16236, eq. 5).

        o_i = a_i q~_i (sum_j k~_j v_j^T) + b_i sum_j v_j + local(v)_i

    The sums run over the n tokens of token i's document; a, b and all else are `AffineMixer`'s. As
    it stands a_i = 1 / (q_i . sum_j k_j + eps) and b_i = 0; y = W_o o.

    Attributes:
      local: what `local` is: "depthwise", a convolution of each channel of v on the document's
        grid; "shared", the same with taps that all heads share; None is 0.
      local_size: its taps along each axis.
      local_stddev: standard deviation of its taps at the start, with biases at 0; None starts both
        as PyTorch's convolutions do.
    """

    local: str | None = None
    local_size: int = 3
    local_stddev: float | None = None

    local_terms = LOCAL_TERMS
    # Tokens per block of the block-causal form, in which there is a state; None is the whole form.
    block_size = None

    @property
    def uses_positions(self) -> bool:
        return self.rope_base is not None or self.local is not None or self.block_size is not None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        if self.block_size is None:
            self.check_no_state(state)
        B, T, _ = x_BTD.shape
        sums, offset_B, grid_length = (None, None), None, T
        if state is not None:  # a piece of a document, which fills no grid
            sums = state.k_sum_BHF1, state.S_BHFV
            offset_B, grid_length = state.next_position_B, None
        grids.check_grid(base.name_of(self), self.grid, grid_length, segment_ids_BT)
        read = functools.partial(
            operators.document_sums,
            scale=1.0,
            segment_ids=segment_ids_BT,
            block_size=self.block_size,
            implementation=self.implementation,
        )
        position_BT = positions.token_positions(B, T, segment_ids_BT, offset_B)
        q_BTHF, k_BTHF = self.features(x_BTD, segment_ids_BT, layer)
        v_BTHV = self.values(x_BTD)
        # The number of tokens that each token sums over, with those of earlier calls.
        one_BTH1, earlier_BH11 = jnp.ones_like(q_BTHF[..., :1]), None
        if offset_B is not None:
            earlier_B111 = offset_B.astype(one_BTH1.dtype)[:, None, None, None]
            earlier_BH11 = jnp.broadcast_to(earlier_B111, (B, self.num_heads, 1, 1))
        count_BTH1, _ = read(one_BTH1, one_BTH1, one_BTH1, initial_state=earlier_BH11)
        k_BTHF = self.weighted(q_BTHF, k_BTHF, count_BTH1, segment_ids_BT)
        coordinates_BTA = self.coordinates(position_BT, layer)
        o_BTHV, sums = self.corrected(
            read, q_BTHF, k_BTHF, v_BTHV, count_BTH1, coordinates_BTA, sums
        )
        o_BTE = o_BTHV.reshape(B, T, -1)
        if self.local is not None:
            self.check_choice("local", self.local_terms)
            local_BTE = self.local_term(v_BTHV, x_BTD, count_BTH1, segment_ids_BT, layer)
            o_BTE = o_BTE + float32(local_BTE)
        state = None if self.block_size is None else State(*sums, position_BT[:, -1] + 1)
        return self.output(o_BTE, x_BTD), state

    @nn.nowrap
    def coordinates(self, position_BT: Array, layer: Any) -> Array:
        """Returns each token's coordinates: the layer's, or those of its place on the grid."""
        if (coordinates_BTA := getattr(layer, "coordinates_BTA", None)) is not None:
            return coordinates_BTA
        return grids.unravel(position_BT, self.grid)

    def local_term(self, v_BTHV, x_BTD, count_BTH1, segment_ids_BT, layer) -> Array:
        """Returns local(v), heads side by side."""
        B, T, H, V = v_BTHV.shape
        init = None
        if self.local_stddev is not None:
            init = nn.initializers.truncated_normal(self.local_stddev)
        conv = grids.DepthwiseConv(
            self.local_size,
            self.grid,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="local",
        )
        if self.local == "depthwise":
            return conv(v_BTHV.reshape(B, T, H * V), segment_ids_BT, layer=layer)
        # Heads are further rows of the batch.
        v_NTV = v_BTHV.swapaxes(1, 2).reshape(B * H, T, V)
        if segment_ids_BT is not None:
            segment_ids_BT = jnp.repeat(segment_ids_BT, H, axis=0)
        y_NTV = conv(v_NTV, segment_ids_BT, layer=layer)
        return y_NTV.reshape(B, H, T, V).swapaxes(1, 2).reshape(B, T, H * V)

    def weighted(self, q_BTHF, k_BTHF, count_BTH1, segment_ids_BT) -> Array:
        """Returns the keys, weighted by what the document's queries look for; here as they are."""
        return k_BTHF


class CausalAffineLinearAttention(AffineMixer, base.ChunkedMixer):
    """Base class of the causal form: every sum and mean of `AffineMixer` is over the tokens so far.

    Its operator is `linear_attention`: one call reads r_i = q_i . sum_{j<=i} k_j, and a second one,
    whose keys have one more feature, a_i q~_i (sum k~_j v_j^T) + b_i sum v_j.
    """

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        B, T, _ = x_BTD.shape
        if state is None:
            state = self.init_state(B)
        read = functools.partial(
            operators.linear_attention,
            scale=1.0,
            segment_ids=segment_ids_BT,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        position_BT = positions.token_positions(B, T, segment_ids_BT, state.next_position_B)
        q_BTHF, k_BTHF = self.features(x_BTD, segment_ids_BT, layer)
        count_BT11 = (position_BT + 1).astype(q_BTHF.dtype)[..., None, None]
        sums = state.k_sum_BHF1, state.S_BHFV
        o_BTHV, sums = self.corrected(
            read, q_BTHF, k_BTHF, self.values(x_BTD), count_BT11, position_BT[..., None], sums
        )
        state = State(*sums, position_BT[:, -1] + 1)
        return self.output(o_BTHV.reshape(B, T, -1), x_BTD), state

    def init_state(self, batch):
        return self.no_sums(batch)


def float32(x: Array) -> Array:
    """Returns x in float32, or as it is if it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
