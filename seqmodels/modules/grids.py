"""Tokens on grids: their coordinates, patches, positions, and depthwise convolutions.

A grid is the tuple of sizes of a document's axes, the last the fastest: (height, width) of an image
or (frames, height, width) of a video. Token i of a document lies at the coordinates of i on it.
A document may be longer than the grid: its first axis goes on. None is one axis of any length.

Letters: A axes of a grid, I taps of a convolution over all axes, E channels of a patch.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from seqmodels import operators
from seqmodels.array_typing import Array, DType
from seqmodels.modules import layers, positions, short_conv

Grid = tuple[int, ...] | None

# ---------------------------------------------------------------- coordinates


def check_grid(
    name: str, grid: Grid, length: int | None = None, segment_ids_BT: Array | None = None
) -> None:
    """Raises ValueError for a grid that is no tuple of sizes, or that a row does not fill.

    Rows with segment ids may hold documents of any length, so only rows without are compared.

    name: who asks, the error's first word. length: tokens of a row; None leaves it open.
    """
    if grid is None:
        return
    if not grid or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(
            f"{name}: grid is {grid!r}; it must be the sizes of a document's axes, such as (8, 8) "
            "for (height, width) or (4, 8, 8) for (frames, height, width)"
        )
    if length is not None and segment_ids_BT is None and length != math.prod(grid):
        raise ValueError(
            f"{name}: grid {tuple(grid)} has {math.prod(grid)} tokens, but a row has {length}; set "
            "the grid to the sizes of your data in patches, or pass segment_ids_BT for rows of "
            "several or shorter documents"
        )


def coordinates(
    batch: int,
    length: int,
    segment_ids_BT: Array | None = None,
    grid: Grid = None,
    layer: Any = None,
) -> Array:
    """Returns each token's coordinates in its document, (B, T, A) int32.

    layer: the `mixers.Layer` of the call; its coordinates_BTA, where given, are returned.

    Raises ValueError for a grid that does not fit, as in `check_grid`, or another number of axes.
    """
    if (coordinates_BTA := getattr(layer, "coordinates_BTA", None)) is not None:
        if grid is not None and coordinates_BTA.shape[-1] != len(grid):
            raise ValueError(
                f"coordinates have {coordinates_BTA.shape[-1]} axes, but grid {tuple(grid)} has "
                f"{len(grid)}"
            )
        return coordinates_BTA
    check_grid("coordinates", grid, length, segment_ids_BT)
    index_BT = positions.token_positions(batch, length, segment_ids_BT, None)
    return unravel(index_BT, grid)


def unravel(index: Array, grid: Grid) -> Array:
    """Returns the coordinates (..., A) of places counted along a grid; the first axis is open."""
    found = []
    for size in reversed((grid or (1,))[1:]):
        found.append(index % size)
        index = index // size
    return jnp.stack([index, *reversed(found)], axis=-1)


def ravel(coordinates_BTA: Array, grid: Sequence[int]) -> Array:
    """Returns each token's place counted along a grid, (B, T), whose first axis is open.

    Coordinates beyond the other axes count as the nearest on them.
    """
    index_BT = jnp.maximum(coordinates_BTA[..., 0], 0)
    for axis, size in enumerate(grid[1:], start=1):
        index_BT = index_BT * size + jnp.clip(coordinates_BTA[..., axis], 0, size - 1)
    return index_BT


def pieces(channels: int, axes: int) -> list[int]:
    """Returns how many of `channels` channels each axis has: equal even numbers.

    What is left over goes to the first axis.

    Raises ValueError for an odd number of channels, or fewer than two for each axis.
    """
    each = 2 * (channels // (2 * axes))
    if channels % 2 or not each:
        raise ValueError(
            f"{channels} channels cannot be shared by {axes} axes: it takes an even number, and at "
            f"least {2 * axes}"
        )
    return [channels - (axes - 1) * each] + [each] * (axes - 1)


# ---------------------------------------------------------------- rotary positions


def _rope_frequencies(pairs: int, K: int, base: float) -> Array:
    return base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def _retnet_frequencies(pairs: int, K: int, base: float) -> Array:
    return base ** -jnp.linspace(0.0, 1.0, pairs, dtype=jnp.float32)


def _lrpe_frequencies(pairs: int, K: int, base: float) -> Array:
    return base ** (-2.0 * jnp.arange(pairs, dtype=jnp.float32) / K)


# {name: (channel pairs of one axis, K, base) -> angles per step along that axis}.
ANGLES: dict[str, Callable[[int, int, float], Array]] = {
    "rope": _rope_frequencies,
    "retnet": _retnet_frequencies,
    "lrpe": _lrpe_frequencies,
}


def rope_nd(
    x_BTHK: Array, coordinates_BTA: Array, base: float = 10_000.0, angles: str = "rope"
) -> Array:
    """Applies rotary embeddings along several axes, each of which turns a piece of the channels.

    Consecutive pieces of the K channels belong to the axes in their order, of equal sizes where
    2A divides K (`pieces`). Inside a piece of P channels, channel pair (i, i + P/2) is rotated by
    the angle coordinate * frequency_i, in float32. On one axis "rope" is `positions.rope`.

    angles: the frequencies of a piece.
      "rope": base^(-2i/P), each piece as a head of its own size.
      "retnet": base^(-i/(P/2 - 1)), from 1 to 1/base, as in RetNet's 2-D form and MALA.
      "lrpe": base^(-2i/K), slower than a head of P channels (LightNet, arXiv 2405.21022).

    Raises ValueError for an unknown name or a number of channels that `pieces` refuses.
    """
    if angles not in ANGLES:
        raise ValueError(f"angles is {angles!r}; choose one of {', '.join(sorted(ANGLES))}")
    K, turned, start = x_BTHK.shape[-1], [], 0
    for axis, P in enumerate(pieces(K, coordinates_BTA.shape[-1])):
        frequency_K = ANGLES[angles](P // 2, K, base)
        position_BT1 = coordinates_BTA[..., axis, None].astype(jnp.float32)
        angle_BTK = position_BT1 * frequency_K[None, None]
        turned.append(positions.rotate(x_BTHK[..., start : start + P], angle_BTK))
        start += P
    return jnp.concatenate(turned, axis=-1)


# ---------------------------------------------------------------- patches


def patch_sizes(patch: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Returns a patch's size along each axis; a number stands for the last two, and 1 for frames.

    Raises ValueError for another number of sizes, or sizes below 1.
    """
    if isinstance(patch, int):
        patch = [1] * (axes - 2) + [patch] * min(axes, 2)
    if len(patch) != axes or any(p < 1 for p in patch):
        raise ValueError(
            f"patch is {patch!r}; expected a number, or {axes} positive sizes, one for each axis"
        )
    return tuple(patch)


def patchify(images: Array, patch: int | Sequence[int]) -> Array:
    """Cuts images (B, height, width, C) or videos (B, frames, height, width, C) into patches.

    Returns tokens (B, T, E) in row-major order, whose E = prod(patch) * C channels are the patch's
    own rows; works on NumPy and JAX arrays. patch: as for `patch_sizes`.

    Raises ValueError for sizes that are no multiples of the patch's.
    """
    B, *sizes, C = images.shape
    A = len(sizes)
    patch = patch_sizes(patch, A)
    if any(n % p for n, p in zip(sizes, patch)):
        raise ValueError(
            f"patchify: patches of {patch} do not cut {tuple(sizes)} into whole ones; take divisors "
            "of these sizes"
        )
    # (B, n_1, p_1, n_2, p_2, ..., C) -> (B, n_1, n_2, ..., p_1, p_2, ..., C)
    split = itertools.chain(*((n // p, p) for n, p in zip(sizes, patch)))
    x = images.reshape(B, *split, C)
    x = x.transpose(0, *range(1, 2 * A, 2), *range(2, 2 * A + 1, 2), 2 * A + 1)
    return x.reshape(B, math.prod(sizes) // math.prod(patch), math.prod(patch) * C)


def unpatchify(tokens_BTE: Array, grid: Sequence[int], patch: int | Sequence[int]) -> Array:
    """Returns the images or videos (B, *sizes, C) whose `patchify` gives tokens_BTE.

    grid: patches along each axis, so that sizes = grid * patch.

    Raises ValueError for tokens that the grid and the patch do not fit.
    """
    B, T, E = tokens_BTE.shape
    A = len(grid)
    patch = patch_sizes(patch, A)
    if math.prod(grid) != T or E % math.prod(patch):
        raise ValueError(
            f"unpatchify: {T} tokens of {E} channels are no grid {tuple(grid)} of patches "
            f"{patch}: it takes {math.prod(grid)} tokens of a multiple of "
            f"{math.prod(patch)} channels"
        )
    x = tokens_BTE.reshape(B, *grid, *patch, E // math.prod(patch))
    x = x.transpose(0, *itertools.chain(*((1 + a, 1 + A + a) for a in range(A))), 2 * A + 1)
    return x.reshape(B, *(n * p for n, p in zip(grid, patch)), -1)


# ---------------------------------------------------------------- added positions


def sinusoids(coordinates_BTA: Array, channels: int, base: float = 10_000.0) -> Array:
    """Returns sines and cosines of each token's coordinates, (B, T, channels) float32.

    Consecutive pieces of the channels belong to the axes in their order (`pieces`). A piece of P
    channels is sin(c w_i), then cos(c w_i), with w_i = base^(-2i/P) (DiT, arXiv 2212.09748).
    """
    found, axes = [], coordinates_BTA.shape[-1]
    for axis, P in enumerate(pieces(channels, axes)):
        position_BT1 = coordinates_BTA[..., axis, None].astype(jnp.float32)
        angle_BTP = position_BT1 * _rope_frequencies(P // 2, channels, base)[None, None]
        found += [jnp.sin(angle_BTP), jnp.cos(angle_BTP)]
    return jnp.concatenate(found, axis=-1)


KINDS = ("per_axis", "per_token", "sinusoidal")


class PositionEmbedding(nn.Module):
    """Adds to each token a vector of its place on the grid: (x_BTD, segment_ids_BT) -> x_BTD.

    Attributes:
      kind: "per_token", a learned vector for each place of the grid (ViT, arXiv 2010.11929);
        "per_axis", the sum of a learned vector for each coordinate of each axis; "sinusoidal",
        `sinusoids`, without parameters. Coordinates beyond a learned table take its last vector.
      grid: sizes of the axes; only "sinusoidal" goes without.
      stddev: standard deviation of the learned vectors at the start.
    """

    kind: str = "per_token"
    grid: Grid = None
    stddev: float = 0.02
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None, *, layer=None) -> Array:
        B, T, D = x_BTD.shape
        if self.kind not in KINDS:
            raise ValueError(
                f"PositionEmbedding: kind is {self.kind!r}; choose one of {', '.join(KINDS)}"
            )
        coordinates_BTA = coordinates(B, T, segment_ids_BT, self.grid, layer)
        if self.kind == "sinusoidal":
            return x_BTD + sinusoids(coordinates_BTA, D).astype(x_BTD.dtype)
        if self.grid is None:
            raise ValueError(
                f"PositionEmbedding: kind {self.kind!r} has a vector for each place, so it needs a "
                "grid; set it, or take kind 'sinusoidal'"
            )
        if self.kind == "per_token":
            tables = {"embedding": (math.prod(self.grid), ravel(coordinates_BTA, self.grid))}
        else:
            tables = {
                f"embedding_{axis}": (size, coordinates_BTA[..., axis])
                for axis, size in enumerate(self.grid)
            }
        init = layers.undecayed(nn.initializers.normal(self.stddev), (None, "embed"))
        for name, (size, index_BT) in tables.items():
            table_ND = self.param(name, init, (size, D), self.param_dtype)
            x_BTD = x_BTD + jnp.take(table_ND, index_BT, axis=0, mode="clip").astype(x_BTD.dtype)
        return x_BTD


# ---------------------------------------------------------------- depthwise convolutions


def kernel_sizes(kernel_size: int | Sequence[int], grid: Grid) -> tuple[int, ...]:
    """Returns a convolution's odd number of taps along each axis of a grid; a number is for all.

    Raises ValueError for even numbers, or a number of sizes that is not that of the axes.
    """
    axes = len(grid or (0,))
    sizes = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sizes) != axes or any(n < 1 or n % 2 == 0 for n in sizes):
        raise ValueError(
            f"kernel_size is {kernel_size!r} on grid {grid}; expected an odd number, or {axes} odd "
            "numbers, one for each axis"
        )
    return sizes


def depthwise(
    x_BTD: Array,
    w: Array,
    segment_ids_BT: Array | None = None,
    grid: Grid = None,
    kernel_size: int | Sequence[int] | None = None,
) -> Array:
    """Computes a depthwise convolution on each document's grid, with zeros beyond its edges:

        y_cD = sum_i w_iD x_{c + offset_i, D}

    over the taps i in row-major order, whose offsets are centred at 0 (a cross-correlation, as deep
    learning's convolutions are). Documents never touch; one may be longer or shorter than the grid,
    and its last row incomplete: what does not exist is zero. Sums are float32 or wider.

    Shifted windows of all tokens take less time than `lax.conv_general_dilated` with a group for
    each channel, on a CPU (docs/results.md), and take taps of each row or token as well.

    Args:
      w: taps (I, D), or (B, I, D) for each row, or (B, T, I, D) for each token that is computed.
      kernel_size: taps along each axis, I in all; None takes as many along each.

    Raises:
      ValueError: a grid that does not fit, or numbers of taps that do not agree.
    """
    check_grid("depthwise", grid, x_BTD.shape[1], segment_ids_BT)
    I, axes = w.shape[-2], len(grid or (0,))
    if kernel_size is None:
        kernel_size = round(I ** (1 / axes))
    sizes = kernel_sizes(kernel_size, grid)
    if math.prod(sizes) != I:
        raise ValueError(f"depthwise: w has {I} taps, but a kernel of {sizes} {math.prod(sizes)}")
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    w_BTID = w.reshape((1,) * (4 - w.ndim) + w.shape) if w.ndim != 3 else w[:, None]
    w_BTID = w_BTID.astype(wide)
    if segment_ids_BT is None:
        y_BTD = _on_whole_grids(x_BTD.astype(wide), w_BTID, grid or x_BTD.shape[1:2], sizes)
    else:
        y_BTD = _in_documents(x_BTD.astype(wide), w_BTID, segment_ids_BT, grid or (1,), sizes)
    return y_BTD.astype(x_BTD.dtype)


def _on_whole_grids(x_BTD: Array, w_BTID: Array, grid: Sequence[int], sizes) -> Array:
    """Returns `depthwise` of rows that are one grid each, as shifted windows of the padded grid."""
    B, _, D = x_BTD.shape
    edges = [(0, 0), *((n // 2, n // 2) for n in sizes), (0, 0)]
    padded = jnp.pad(x_BTD.reshape(B, *grid, D), edges)
    y_BTD = jnp.zeros_like(x_BTD)
    for i, corner in enumerate(itertools.product(*map(range, sizes))):
        window = tuple(slice(start, start + n) for start, n in zip(corner, grid))
        y_BTD = y_BTD + w_BTID[:, :, i] * padded[:, *window].reshape(x_BTD.shape)
    return y_BTD


def _in_documents(x_BTD, w_BTID, segment_ids_BT, grid, sizes) -> Array:
    """Returns `depthwise` of packed documents, as shifts of the row masked where they leave one."""
    B, T, _ = x_BTD.shape
    coordinates_BTA = coordinates(B, T, segment_ids_BT, grid)
    document_BT = operators.run_index(segment_ids_BT)
    y_BTD = jnp.zeros_like(x_BTD)
    for i, offset in enumerate(itertools.product(*(range(-(n // 2), n // 2 + 1) for n in sizes))):
        # On the flat grid a neighbour is `shift` tokens away, if it lies in the same document and
        # no axis but the first runs over its end.
        shift = 0
        for step, size in zip(offset, grid):
            shift = shift * size + step
        exists_BT = _shifted(document_BT, shift, -1) == document_BT
        for axis in range(1, len(grid)):
            place_BT = coordinates_BTA[..., axis] + offset[axis]
            exists_BT &= (place_BT >= 0) & (place_BT < grid[axis])
        neighbour_BTD = jnp.where(exists_BT[..., None], _shifted(x_BTD, shift, 0), 0)
        y_BTD = y_BTD + w_BTID[:, :, i] * neighbour_BTD
    return y_BTD


def _shifted(x_BT: Array, shift: int, fill) -> Array:
    """Returns y_t = x_{t + shift} along axis 1, and `fill` beyond the row's ends."""
    T = x_BT.shape[1]
    if abs(shift) >= T:
        return jnp.full_like(x_BT, fill)
    edges = [(0, 0)] * x_BT.ndim
    edges[1] = (max(-shift, 0), max(shift, 0))
    padded = jnp.pad(x_BT, edges, constant_values=fill)
    return padded[:, max(shift, 0) : max(shift, 0) + T]


class DepthwiseConv(nn.Module):
    """Depthwise convolution on the grid of each document, `depthwise` with learned taps.

    A call on (x_BTD, segment_ids_BT) returns y_BTD. Taps and bias start as PyTorch's convolutions
    do, U(-1/sqrt(I), 1/sqrt(I)).

    Attributes:
      kernel_size: odd number of taps along each axis, or of each axis.
      grid: sizes of the axes; None is one axis.
      kernel_init: initializer of the taps (I, D), with the bias at 0; None is as above.
    """

    kernel_size: int | tuple[int, ...] = 3
    grid: Grid = None
    use_bias: bool = True
    kernel_init: Callable | None = None
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None = None, *, layer=None) -> Array:
        """Returns y_BTD; raises ValueError for `layer`s whose tokens lie on no grid."""
        if getattr(layer, "coordinates_BTA", None) is not None:
            raise ValueError(
                "DepthwiseConv: tokens whose coordinates are given (points, or a grid in another "
                "order) have no neighbours in the row; use it where tokens lie row by row on a grid"
            )
        D, sizes = x_BTD.shape[-1], kernel_sizes(self.kernel_size, self.grid)
        I = math.prod(sizes)
        init = short_conv.uniform_fan_in(I)
        kernel_init = layers.partitioned(self.kernel_init or init, (None, "heads"))
        w_ID = self.param("kernel", kernel_init, (I, D), self.param_dtype).astype(self.dtype)
        y_BTD = depthwise(x_BTD.astype(self.dtype), w_ID, segment_ids_BT, self.grid, sizes)
        if self.use_bias:
            bias_init = layers.undecayed(
                nn.initializers.zeros if self.kernel_init else init, ("heads",)
            )
            bias_D = self.param("bias", bias_init, (D,), self.param_dtype)
            y_BTD = y_BTD + bias_D.astype(self.dtype)[None, None]
        return y_BTD
