"""Any mixer on the tokens of a grid, or points, in another order and in groups."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from seqmodels.array_typing import Array
from seqmodels.mixers import base, wrapper
from seqmodels.modules import grids, orders


class Ordered(wrapper.Wrapper):
    """A mixer whose tokens come in a scan order, cut into groups (LION, arXiv 2407.18232).

        y = P^-1 f(P x)

    P permutes the tokens of each document into the order; f, the mixer, sees each group of `group`
    tokens that follow each other in it as a document. A document that does not fill the grid keeps
    the order of those places that it has; tokens beyond the grid's end come after them, in the same
    order on a copy of the grid. Tokens with coordinates (`Layer.coordinates_BTA`) are ordered by
    these. A mixer of whole documents gets each token's coordinates on the grid.

    Attributes:
      mixer: any mixer and its options, as in a pattern: "bidirectional(mixer='mamba2')".
      order: a name of `orders.ORDERS`, such as "hilbert".
      group: tokens of a group, of which a document's last may have fewer; None is the document.
    """

    order: str = "row_major"
    group: int | None = None

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        B, T, _ = x_BTD.shape
        if self.group is not None and self.group < 1:
            raise ValueError(f"ordered: group is {self.group}; expected 1 or more tokens, or None")
        index, inverse = self._permutation(B, T, segment_ids_BT, layer)
        mixer = self.make_wrapped(name="mixer")
        if not mixer.causal:
            coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
            coordinates_BTA = orders.permute(coordinates_BTA, index, inverse)
            layer = layer or base.Layer(0, 1)
            layer = dataclasses.replace(layer, coordinates_BTA=coordinates_BTA)
        # Documents keep their places in the row, and so do their ids.
        ids_BT = segment_ids_BT
        if self.group is not None:
            ids_BT = orders.group_ids(B, T, segment_ids_BT, self.group)
        y_BTD, _ = mixer(orders.permute(x_BTD, index, inverse), ids_BT, layer=layer)
        return orders.permute(y_BTD, inverse, index), None

    @nn.nowrap
    def _permutation(self, B: int, T: int, segment_ids_BT, layer) -> tuple[Array, Array]:
        """Returns P and its inverse, (T,) where all rows are one grid, else (B, T)."""
        given = layer is not None and layer.coordinates_BTA is not None
        if given and self.grid is None:
            raise ValueError(
                "ordered: tokens with coordinates need a grid, the sizes of the space that they "
                "lie in: set grid"
            )
        grid = tuple(self.grid or (T,))
        if segment_ids_BT is None and not given:
            grids.check_grid("ordered", grid, T)
            order_T = orders.order(self.order, grid)
            return jnp.asarray(order_T), jnp.asarray(np.argsort(order_T))
        coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, grid, layer)
        key_BT = orders.scan_keys(coordinates_BTA, self.order, grid)
        return orders.sort_documents(key_BT, segment_ids_BT)
