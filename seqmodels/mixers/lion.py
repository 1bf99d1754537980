"""LION's linear group RNN for point sets: a causal mixer over large groups of neighbours."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.array_typing import Array
from seqmodels.mixers import base, bidirectional, wrapper
from seqmodels.modules import grids, norms, orders, voxels, windows

DIRECTIONS = ("x", "y", "alternate")


class LION(wrapper.Wrapper):
    """LION's linear group RNN on voxels with coordinates (Liu et al., arXiv 2407.18232, section 3).

        y = P^-1 f(P x), f over groups of G tokens, forward and backward

    P sorts the tokens of each document by window, then inside a window, both x-major or both
    y-major; x and y are the last two axes, the others lie in one window whole. The sorted tokens
    are cut into groups of G, across windows, which f does not leave: f is the mixer in both
    directions of each group. A document's last group is shorter, where the authors repeat tokens.

    One published layer, x-major and y-major, is "lion(direction='x') + lion(direction='y')" with
    `channel_mixer=None`; the second layer's windows are shifted by half a window. With the defaults
    four layers of "lion" are these two. With `depth` the mixer is the published block, a U:

        h_l = x_l + f_l(norm(x_l)),  x_{l+1} = norm(merge(spawn(h_l))),
        then h_l <- norm(h_l + h_{l+1} of the voxel that it was merged into)

    `voxels.spawn` adds empty voxels near those with the largest features, for f to fill in;
    `voxels.merge` halves the coordinates. Left out: the sparse convolutions before merging, the
    learned positions (an encoder has its own) and, in Mamba, sharing of projections by directions.

    Attributes:
      mixer: the causal mixer and its options, as in a pattern; the authors' are Mamba, RWKV,
        RetNet, xLSTM and TTT.
      group: G; the authors have 4096 in the first block to 256 in the last. None is the document.
      window: tokens of a window along x and along y; None is one window.
      direction: "x", "y", or "alternate": "x" in even layers.
      shift: whether windows are shifted by half a window; None shifts them in every second pair of
        layers.
      depth: number of times that voxels are merged; 0 leaves the U out, the authors have 2.
      share: share of a document's voxels that spawn new ones before they are merged.
    """

    mixer: str = "mamba"
    group: int | None = 4096
    window: int | None = 13
    direction: str = "alternate"
    shift: bool | None = None
    depth: int = 0
    share: float = 0.2

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT=None, state=None, *, layer=None):
        self.check_no_state(state)
        self._check()
        B, T, _ = x_BTD.shape
        coordinates_BTA = grids.coordinates(B, T, segment_ids_BT, self.grid, layer)
        layer = layer or base.Layer(0, 1)
        if not self.depth:
            return self._grouped("mixer", x_BTD, coordinates_BTA, segment_ids_BT, layer), None
        level, above = voxels.points(x_BTD, coordinates_BTA, segment_ids_BT), []
        # Down: each level's mixer, then new voxels, then half the resolution.
        for depth in range(self.depth):
            h_BND = self._level(f"level_{depth}", level, layer)
            spawned = voxels.spawn(level._replace(x_BND=h_BND), self.share)
            level, place_BN = voxels.merge(spawned)
            level = level._replace(x_BND=self._norm(f"merged_norm_{depth}", level.x_BND))
            above.append((h_BND, place_BN[:, : h_BND.shape[1]]))
        h_BND = self._level(f"level_{self.depth}", level, layer)
        # Up: to each voxel the features of the one that it was merged into.
        for depth, (upper_BND, place_BN) in reversed(list(enumerate(above))):
            h_BND = upper_BND + voxels.unmerge(h_BND, place_BN)
            h_BND = self._norm(f"up_norm_{depth}", h_BND)
        return h_BND, None

    @nn.nowrap
    def _check(self) -> None:
        self.check_choice("direction", DIRECTIONS)
        for name, least in (("group", 1), ("window", 1), ("depth", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"lion: {name} is {value}; it must be at least {least}")
        if not 0 <= self.share < 1:
            raise ValueError(f"lion: share is {self.share}; it must be at least 0 and less than 1")

    def _norm(self, name: str, x_BND: Array) -> Array:
        return norms.LayerNorm(name=name)(x_BND).astype(self.dtype)

    def _level(self, name: str, level: voxels.Points, layer) -> Array:
        x_BND, coordinates_BNA, ids_BN = level
        h_BND = self._norm(f"{name}_norm", x_BND)
        return x_BND + self._grouped(name, h_BND, coordinates_BNA, ids_BN, layer)

    def _grouped(self, name: str, x_BTD, coordinates_BTA, segment_ids_BT, layer) -> Array:
        """Returns y of P, groups and the mixer, whose parameters are called `name`."""
        B, T, _ = x_BTD.shape
        keys = sort_keys(coordinates_BTA, self.window, self._is_x(layer), self._shifted(layer))
        index_BT, inverse_BT = orders.sort_documents(keys, segment_ids_BT)
        ids_BT = orders.group_ids(B, T, segment_ids_BT, self.group)
        mixer = bidirectional.Bidirectional(
            self.d_model,
            mixer=self.mixer,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            name=name,
        )
        layer = dataclasses.replace(layer, coordinates_BTA=None)
        y_BTD, _ = mixer(orders.permute(x_BTD, index_BT, inverse_BT), ids_BT, layer=layer)
        return orders.permute(y_BTD, inverse_BT, index_BT)

    @nn.nowrap
    def _is_x(self, layer):
        return layer.index % 2 == 0 if self.direction == "alternate" else self.direction == "x"

    @nn.nowrap
    def _shifted(self, layer):
        return layer.index // 2 % 2 == 1 if self.shift is None else self.shift


def sort_keys(coordinates_BTA: Array, window: int | None, is_x, shifted) -> list[Array]:
    """Returns the keys that LION sorts tokens by, (B, T) each, the first the most significant.

    They are the windows' coordinates and then the tokens', x first where `is_x`, else y first; the
    axes before x and y come last. On one axis there is only x.

    is_x, shifted: booleans, or traced ones.
    """
    *others, x = [coordinates_BTA[..., axis] for axis in range(coordinates_BTA.shape[-1])]
    y = others.pop() if others else jnp.zeros_like(x)
    first, second = jnp.where(is_x, x, y), jnp.where(is_x, y, x)
    if window is None:
        return [first, second, *others]
    in_plane_BTA = jnp.stack([first, second], axis=-1)
    return [*windows.boxes(in_plane_BTA, (window,) * 2, shifted), first, second, *others]
