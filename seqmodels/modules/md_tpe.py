"""MD-TPE: positions of a grid as decaying sums of the embeddings along each axis; all by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array, DType
from seqmodels.modules import grids, layers, norms, orders


class MDTPE(nn.Module):
    """Adds MD-TPE to embeddings (LightNet, arXiv 2405.21022; authors' code xmixers).

        y_t = x_t + sum_a W_a RMSNorm(o_ta)
        o_tah = (q_ah . k_ah) sum_{s <= t on t's line along a} sigmoid(lambda_ah)^(steps to t) x_sh

    for the axes a of the grid and heads h, the norm on each head. It is causal along each axis. q,
    k and lambda are learned and constant in time; the norm leaves only the sign of q . k. W_a
    starts near 0, Xavier's values times 0.01, the others at N(0, 1).

    A call on (x_BTD, segment_ids_BT) returns y_BTD.

    Attributes:
      num_heads: H, each with its own decay along each axis.
      grid: sizes of the axes; None is one axis.
      eps: epsilon of the norm.
    """

    num_heads: int = 4
    grid: grids.Grid = None
    eps: float = 1e-5
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None, *, layer=None) -> Array:
        B, T, D = x_BTD.shape
        H = self.num_heads
        if D % H:
            raise ValueError(f"MDTPE: num_heads {H} must divide the embeddings' width {D}")
        coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
        normal = nn.initializers.normal(1.0)
        tiny = nn.initializers.variance_scaling(0.01**2, "fan_avg", "uniform")
        y_BTD = x_BTD
        for axis in range(coordinates_BTA.shape[-1]):
            q_HK, k_HK = (
                layers.gate_parameter(self, f"{name}_{axis}", normal, (H, D // H)) for name in "qk"
            )
            lambda_H = layers.gate_parameter(self, f"decay_{axis}", normal, (H,))
            log_decay_H = jax.nn.log_sigmoid(lambda_H)
            o_BTD = _along(axis, x_BTD, coordinates_BTA, segment_ids_BT, log_decay_H)
            size_H = jnp.repeat(jnp.sum(q_HK * k_HK, axis=-1), D // H)
            o_BTD = (o_BTD * size_H[None, None]).astype(self.dtype)
            o_BTD = norms.RMSNorm(self.eps, groups=H, name=f"norm_{axis}")(o_BTD)
            dense = layers.dense(
                D, f"o_{axis}", axes=("heads", "embed"), use_bias=False, kernel_init=tiny,
                dtype=self.dtype, param_dtype=self.param_dtype,
            )  # fmt: skip
            y_BTD = y_BTD + dense(o_BTD).astype(x_BTD.dtype)
        return y_BTD


def _along(axis: int, x_BTD, coordinates_BTA, segment_ids_BT, log_decay_H) -> Array:
    """Returns the decaying sums of x_BTD along one axis of each document, in float32."""
    B, T, D = x_BTD.shape
    # Tokens of a line follow each other when sorted by their other coordinates, then by this one.
    others = [coordinates_BTA[..., a] for a in range(coordinates_BTA.shape[-1]) if a != axis]
    keys = (*others, coordinates_BTA[..., axis])
    index_BT, inverse_BT = orders.sort_documents(keys, segment_ids_BT)
    # A line starts where the document or another coordinate changes.
    start_BT = jnp.zeros((B, T), bool)
    if segment_ids_BT is not None:
        start_BT = operators.starts(segment_ids_BT)
    for other_BT in others:
        start_BT |= operators.starts(orders.permute(other_BT, index_BT, inverse_BT))
    line_BT = operators.associative_scan(jnp.add, start_BT.astype(jnp.int32), "BT")
    o_BTD, _ = operators.diagonal_scan(
        orders.permute(x_BTD.astype(jnp.float32), index_BT, inverse_BT),
        log_decay=jnp.repeat(log_decay_H, D // log_decay_H.shape[0]),
        segment_ids=line_BT,
    )
    return orders.permute(o_BTD, inverse_BT, index_BT)


KINDS = (*grids.KINDS, "md_tpe")


def make(kind: str, grid: grids.Grid, **keywords) -> nn.Module:
    """Makes the module of KINDS that adds positions on a grid to embeddings.

    It is called as `grids.PositionEmbedding` is. keywords: dtypes and name.

    Raises ValueError, listing the choices, for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown positions {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "md_tpe":
        return MDTPE(grid=grid, **keywords)
    return grids.PositionEmbedding(kind, grid, **keywords)
