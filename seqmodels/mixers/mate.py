"""LinGen's MATE: Mamba-2 in rotating scan orders, and softmax attention in small windows."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from seqmodels import operators
from seqmodels.array_typing import Array
from seqmodels.mixers import base, bidirectional, wrapper
from seqmodels.modules import grids, orders, review_tokens, windows

# The scan orders of four layers in turn: rotary-major scan.
ROTARY = (
    "spatial_row_major",
    "spatial_column_major",
    "temporal_row_major",
    "temporal_column_major",
)


class MATE(wrapper.Wrapper):
    """LinGen's MATE block, in place of self-attention (Wang et al., arXiv 2412.09856, section 3).

        y = MA(x) + TE(x)
        MA(x) = P^-1 f([r, P x]),  f forward and backward
        TE(x)_t = sum_{s in t's window} softmax_s(q_t . k_s / sqrt(K)) v_s

    P permutes the tokens of a video into one of four scan orders, another in each layer (rotary-
    major scan): frame by frame, row-major or column-major, or place by place through all frames,
    row-major or column-major. r are review tokens, means of the sequence itself, from which the
    state starts. Windows are boxes of the grid, shifted by half a box in every other layer.

    The paper's text does not say how review tokens are pooled or how large windows are: here a
    review token is the mean of `review` tokens that follow each other in the scan order, and the
    window's default is ours. Shifted windows at the edges are smaller ones.

    On a grid of two axes there is one frame; without a grid all orders are the tokens' own.

    Attributes:
      mixer: f, a causal mixer and its options, as in a pattern.
      scan: "rotary", or a name of `orders.ORDERS` for all layers; None leaves MA out.
      review: tokens per review token, of which a document's last may stand for more; a document
        with fewer has none. None leaves review tokens out.
      num_heads: H of TE; K = V = D / H.
      window: the box's size along each axis of the grid, or one number for all axes; None leaves TE
        out.
    """

    mixer: str = "mamba2"
    scan: str | None = "rotary"
    review: int | None = 16
    num_heads: int = 4
    window: int | tuple[int, ...] | None = 4

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        layer = layer or base.Layer(0, 1)
        B, T, _ = x_BTD.shape
        if self.scan is None and self.window is None:
            raise ValueError("mate: scan and window are both None: there is nothing to compute")
        coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
        parts, sizes = [], None
        if self.window is not None:
            sizes = windows.sizes("mate", self.window, coordinates_BTA.shape[-1])
        if self.scan is not None:
            parts.append(self._scanned(x_BTD, coordinates_BTA, segment_ids_BT, layer))
        if sizes is not None:
            parts.append(self._windowed(x_BTD, coordinates_BTA, segment_ids_BT, layer, sizes))
        return functools.reduce(jnp.add, parts), None

    def _scanned(self, x_BTD, coordinates_BTA, segment_ids_BT, layer) -> Array:
        """Returns MA(x)."""
        if self.review is not None and self.review < 1:
            raise ValueError(f"mate: review is {self.review}; expected 1 or more tokens, or None")
        key_BT = self._scan_key(coordinates_BTA, layer)
        index_BT, inverse_BT = orders.sort_documents(key_BT, segment_ids_BT)
        x_BTD = orders.permute(x_BTD.astype(self.dtype), index_BT, inverse_BT)
        mixer = bidirectional.Bidirectional(
            self.d_model,
            mixer=self.mixer,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            name="mixer",
        )
        layer = dataclasses.replace(layer, coordinates_BTA=None)
        if self.review is None or self.review > x_BTD.shape[1]:
            y_BTD, _ = mixer(x_BTD, segment_ids_BT, layer=layer)
        else:
            x_BSD, ids_BS, place_BT = review_tokens.prepend(x_BTD, segment_ids_BT, self.review)
            y_BSD, _ = mixer(x_BSD, ids_BS, layer=layer)
            y_BTD = jnp.take_along_axis(y_BSD, place_BT[..., None], axis=1)
        return orders.permute(y_BTD, inverse_BT, index_BT)

    @nn.nowrap
    def _scan_key(self, coordinates_BTA: Array, layer) -> Array:
        """Returns each token's place in the layer's scan order, (B, T) int32."""
        if self.grid is None and layer.coordinates_BTA is not None:
            raise ValueError(
                "mate: tokens with coordinates need a grid, the sizes of the space that they lie "
                "in: set grid"
            )
        if self.grid is None and self.scan == "rotary":
            return coordinates_BTA[..., 0]
        names, grid = (self.scan,), tuple(self.grid or coordinates_BTA.shape[1:2])
        if self.scan == "rotary":
            # An image is a video of one frame.
            names, missing = ROTARY, 3 - len(grid)
            grid = (1,) * missing + grid
            edges = ((0, 0), (0, 0), (missing, 0))
            coordinates_BTA = jnp.pad(coordinates_BTA, edges) if missing > 0 else coordinates_BTA
        N = math.prod(grid)
        rank_RN = np.stack([np.argsort(orders.order(name, grid)) for name in names])
        rank_N = jnp.asarray(rank_RN, jnp.int32)[layer.index % len(names)]
        # Tokens beyond the end of the first axis lie on a copy of the grid behind it.
        place_BT = grids.ravel(coordinates_BTA, grid)
        return place_BT // N * N + jnp.take(rank_N, place_BT % N)

    def _windowed(self, x_BTD, coordinates_BTA, segment_ids_BT, layer, sizes) -> Array:
        """Returns TE(x), softmax attention over tokens that are sorted by window."""
        H, K = self.num_heads, self.width_per_head(self.num_heads)
        boxes = windows.boxes(coordinates_BTA, sizes, layer.index % 2 == 1)
        index_BT, inverse_BT, ids_BT = windows.sort(boxes, segment_ids_BT)
        x_BTD = orders.permute(x_BTD.astype(self.dtype), index_BT, inverse_BT)
        q_BTHK, k_BTHK, v_BTHV = (self.project_heads(x_BTD, H, K, name) for name in "qkv")
        # A box of the grid has no more tokens than places; one of given points may have.
        reach = None if layer.coordinates_BTA is not None else math.prod(sizes)
        o_BTHV = operators.softmax_attention(
            q_BTHK, k_BTHK, v_BTHV, causal=False, window=reach, segment_ids=ids_BT
        )
        return orders.permute(self.merge_heads(o_BTHV), inverse_BT, index_BT)
