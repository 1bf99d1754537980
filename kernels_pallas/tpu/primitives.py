"""What goes on inside the TPU kernels of the matrix recurrences: products, sums and inverses of one
chunk in VMEM.

Everything here takes and returns values, not references, and stands for a kernel's body: only what
Mosaic lowers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products in a kernel, with the rounding said.

    narrow: the inputs are bfloat16. They go to the matrix unit as they are; what was computed from
      them, in float32, goes as a sum of two bfloat16 terms, and the product of the two smaller
      terms is left out (2^-16 of the whole). Rounding it to one term costs up to twice the suite's
      2e-2 at the worst position of a gradient. Otherwise operands are float32 and products at the
      highest precision.
    exact: float32 where rounding errors may never fade: `state` rounds once (see
      `delta_rule.reflections`).

    The terms are cut explicitly, never left to a device's default precision, so an interpreted
    kernel rounds as a compiled one does. axes: which axis of x and of y is summed over.
    """

    narrow: bool
    exact: bool = False

    def dot(self, x, y, axes=(1, 0), terms=2):
        """x y, in float32."""
        if not self.narrow:
            return _dot(x.astype(jnp.float32), y.astype(jnp.float32), axes)
        x, y = _terms(x, terms), _terms(y, terms)
        products = [
            _dot(x[i], y[n - i], axes)
            for n in range(terms)
            for i in range(n + 1)
            if i < len(x) and n - i < len(y)
        ]
        return sum(reversed(products[:-1]), start=products[-1])

    def precise(self, x, y, axes=(1, 0)):
        """x y to 24 bits: of an inverse, whose errors may be hundreds of times those of its
        products."""
        return self.dot(x, y, axes, terms=3)

    def state(self, x, y, axes=(1, 0)):
        """A product by which states become states."""
        return sum(self.exact_product(x, y, axes)) if self.exact else self.precise(x, y, axes)

    def ones(self, where):
        """True as 1 and False as 0, for sums by `dot`: exact in either dtype."""
        return where.astype(jnp.bfloat16 if self.narrow else jnp.float32)

    def exact_product(self, x, y, axes, y_squares=None):
        """A float32 product as two terms: of heads of 11 bits, whose products and sums are exact,
        and the small rest.

        y_squares: sums of y^2 that say how large y is, for each of its entries; None: those over
        all that is summed. Of sums over tokens (axes (0, 0)), those whose product is 0, of other
        documents, have no part in how the rest is rounded.
        """
        if y_squares is None:
            if axes == (0, 0):
                x, y = _where_any(y, x), _where_any(x, y)
            y_squares = _squares(y, axes[1])
        x_head, y_head = _head(x, _squares(x, axes[0])), _head(y, y_squares)
        rest = _dot(x - x_head, y, axes) + _dot(x_head, y - y_head, axes)
        return _dot(x_head, y_head, axes), rest


def _terms(x, count):
    """x as a sum of bfloat16 arrays, largest first: itself, or `count` of them.

    Interpreted, they are float32 arrays of the same values: XLA on a CPU may refuse bfloat16
    products, and drops a conversion to bfloat16 and back.
    """
    interpreting = devices.interpreting()
    if x.dtype == jnp.bfloat16:
        return [x.astype(jnp.float32) if interpreting else x]
    terms = []
    for _ in range(count):
        if interpreting:
            terms.append(jax.lax.reduce_precision(x, 8, 7))
            x = x - terms[-1]
        else:
            terms.append(x.astype(jnp.bfloat16))
            x = x - terms[-1].astype(jnp.float32)
    return terms


def _dot(x, y, axes):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _squares(x, axis):
    return jnp.sum(x * x, axis=axis, keepdims=True)


def _where_any(rows, x):
    """x (C, ...), 0 in the rows in which all of `rows` (C, ...) is."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)  # squares of 1e-22 are 0
    return jnp.where(largest > 0, x, 0.0)


def _head(x, squares):
    """x rounded to 11 bits below the power of two that its norm reaches, from the norm's square."""
    norm = jnp.sqrt(squares)
    bits = jax.lax.bitcast_convert_type(norm, jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    unit = jnp.maximum(power, 2.0**-64) * 2.0**-10
    return jnp.round(x / unit) * unit


def head_cuts(G: int, H: int, K: int, V: int, most: int, *, per_channel: bool, own_keys=False):
    """(value heads, key heads) that a grid step may take, most first.

    Mosaic cuts an array's last dimension into whole registers of 128 lanes, or not at all. Heads
    lie side by side there: H of V values, G of K keys.

    per_channel: a decay per channel is an array too, of H heads of K.
    own_keys: every step writes gradients of the key heads that it reads to a place of its own, also
      where steps share one.
    """
    shared, cuts = H // G, []
    for heads in range(min(H, most), 0, -1):
        keys = max(1, heads // shared)
        blocks = [(heads * V, H * V), (keys * K, H // heads * keys * K if own_keys else G * K)]
        if per_channel:
            blocks.append((heads * K, H * K))
        whole = H % heads == 0 and (heads % shared == 0 or shared % heads == 0)
        if whole and all(block % LANES == 0 or block == array for block, array in blocks):
            cuts.append((heads, keys))
    return cuts


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(C: int, diagonal: int = 0):
    """True at (i, j) where j <= i + diagonal."""
    return iota((C, C), 1) <= iota((C, C), 0) + diagonal


def in_turns(generators):
    """Runs generators in step, from `yield` to `yield`, and returns what each returns.

    A head's products wait for one another; those of other heads fill the gaps, but only where the
    kernel's operations come in that order: the compiler moves them little.
    """
    results, running = {}, dict(enumerate(generators))
    while running:
        for n, generator in list(running.items()):
            try:
                next(generator)
            except StopIteration as stop:
                results[n] = stop.value
                del running[n]
    return [results[n] for n in sorted(results)]


BLOCK = 32


def inverse(products: Products, A_CC):
    """(I + A)^{-1} for A strictly lower triangular, in float32.

    Diagonal blocks of 32 by substitution on the vector unit, all of a chunk's side by side in the
    lanes; then neighbours are joined, [X1 0; Y X2] with Y = -X2 A21 X1, by two products a level, to
    24 bits. A generator, for `in_turns`.
    """
    C = A_CC.shape[0]
    U = min(C, BLOCK)
    X_CC = yield from _block_inverse(A_CC, U)
    while U < C:
        X_CC = yield from _joined(products, A_CC, X_CC, U)
        U *= 2
    return X_CC


def _joined(products, A_CC, X_CC, U):
    C = A_CC.shape[0]
    if 2 * U == C:
        X1, X2 = X_CC[:U, :U], X_CC[U:, U:]
        Y = products.precise(A_CC[U:, :U], X1)
        yield
        Y = -products.precise(X2, Y)
        yield
        top = jnp.concatenate([X1, jnp.zeros_like(Y)], axis=1)
        return jnp.concatenate([top, jnp.concatenate([Y, X2], axis=1)], axis=0)
    i, j = iota((C, C), 0) // U, iota((C, C), 1) // U
    below = (i == j + 1) & (i % 2 == 1)
    Y_CC = products.precise(jnp.where(below, A_CC, 0.0), X_CC)
    yield
    Y_CC = products.precise(X_CC, Y_CC)
    yield
    return X_CC - Y_CC


def _block_inverse(A_CC, U):
    """The inverses of the U x U diagonal blocks of I + A, zero elsewhere."""
    C = A_CC.shape[0]
    width = min(C, LANES)
    strips = []
    for first in range(0, C, width):
        strip = yield from _strip_inverse(A_CC[first : first + width, first : first + width], U)
        before = [jnp.zeros((width, first), jnp.float32)] if first else []
        behind = C - first - width
        after = [jnp.zeros((width, behind), jnp.float32)] if behind else []
        strips.append(jnp.concatenate([*before, strip, *after], axis=1) if width < C else strip)
    return jnp.concatenate(strips, axis=0) if width < C else strips[0]


def _strip_inverse(A_CC, U):
    """The same for C of at most 128: row by row, the rows of all blocks at once, a block's columns
    in its own lanes."""
    C = A_CC.shape[0]
    step = min(U, SUBLANES)
    lane = iota((step, C), 1)
    block = lane // U

    def own(rows, b):
        return jnp.where(block == b, rows, 0.0)

    A_tiles, X_tiles = [], []
    for t in range(0, U, step):
        parts = [own(A_CC[b * U + t : b * U + t + step], b) for b in range(C // U)]
        A_tiles.append(sum(parts[1:], start=parts[0]))
        X_tiles.append(jnp.where(lane % U == iota((step, C), 0) + t, 1.0, 0.0))
    for j in range(U - 1):
        row = X_tiles[j // step][j % step : j % step + 1]
        for t in range((j + 1) // step, U // step):
            factor = jnp.take_along_axis(
                A_tiles[t], block * U + j, axis=1, mode="promise_in_bounds"
            )
            X_tiles[t] = X_tiles[t] - factor * row
        yield
    rows = [own(X_tiles[t], b) for b in range(C // U) for t in range(U // step)]
    return jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]


def row_sums(x):
    return jnp.sum(x, axis=1, keepdims=True)


def row_of(x_C1):
    """A column as a row."""
    C = x_C1.shape[0]
    return jnp.sum(jnp.where(_diagonal(C), x_C1, 0.0), axis=0, keepdims=True)


def column_of(x_1C):
    """A row as a column."""
    return row_sums(jnp.where(_diagonal(x_1C.shape[1]), x_1C, 0.0))


def _diagonal(C):
    return iota((C, C), 0) == iota((C, C), 1)


def halving_sums(g_CK):
    """Sums of log decay (C, K), C a power of two, as `decay_sums` has them, for a decay per
    channel.

    Returns: from the chunk's start through each token; behind each token to the chunk's end; then
    for halves of U = 1, 2, 4, ..., C/2 tokens, in left halves the sum behind a token to the half's
    end, in right halves the sum from the half's start through the token. A block's sums are those
    of its halves and the total of one half, so each is an addition of non-positive numbers only.
    """
    C = g_CK.shape[0]
    through_CK, after_CK, levels = g_CK, jnp.zeros_like(g_CK), []
    U = 1
    while U < C:
        right = _in_right_half(g_CK, U)
        levels.append(jnp.where(right, through_CK, after_CK))
        sibling_CK = _sibling_last(through_CK, U)
        through_CK = jnp.where(right, through_CK + sibling_CK, through_CK)
        after_CK = jnp.where(right, after_CK, after_CK + sibling_CK)
        U *= 2
    return through_CK, after_CK, *levels


def halving_sums_cotangent(dthrough_CK, dafter_CK, dlevels):
    """The transpose of `halving_sums`: from the cotangents of what it gives to that of g."""
    dg_CK = jnp.zeros_like(dthrough_CK)
    U = dthrough_CK.shape[0]
    for dlevel_CK in reversed(dlevels):
        U //= 2
        right = _in_right_half(dg_CK, U)
        dg_CK = dg_CK + _sibling_total(jnp.where(right, dthrough_CK, dafter_CK), U)
        dthrough_CK = jnp.where(right, dthrough_CK + dlevel_CK, dthrough_CK)
        dafter_CK = jnp.where(right, dafter_CK, dafter_CK + dlevel_CK)
    return dg_CK + dthrough_CK


def _in_right_half(x_CK, U):
    return iota(x_CK.shape, 0) & U > 0


def _sibling_last(x_CK, U):
    """For every token the last row of the block of U tokens beside its own, in the same pair of
    blocks."""
    C, K = x_CK.shape
    if U >= SUBLANES:
        last = x_CK.reshape(C // (2 * U), 2, U, K)[:, :, U - 1 :]
        swapped = jnp.concatenate([last[:, 1:], last[:, :1]], axis=1)
        return jnp.broadcast_to(swapped, (C // (2 * U), 2, U, K)).reshape(C, K)
    row = iota((SUBLANES, K), 0)
    last = ((row // U) ^ 1) * U + U - 1
    tiles = [x_CK[t : t + SUBLANES] for t in range(0, C, SUBLANES)]
    tiles = [jnp.take_along_axis(x, last, axis=0, mode="promise_in_bounds") for x in tiles]
    return jnp.concatenate(tiles, axis=0)


def _sibling_total(x_CK, U):
    """For every token the sum over the block of U tokens beside its own, in the same pair of
    blocks."""
    C, K = x_CK.shape
    if U >= SUBLANES:
        total = jnp.sum(x_CK.reshape(C // (2 * U), 2, U, K), axis=2, keepdims=True)
        swapped = jnp.concatenate([total[:, 1:], total[:, :1]], axis=1)
        return jnp.broadcast_to(swapped, (C // (2 * U), 2, U, K)).reshape(C, K)
    row = iota((SUBLANES, K), 0)
    tiles = [x_CK[t : t + SUBLANES] for t in range(0, C, SUBLANES)]

    def beside(x, distance):
        return jnp.take_along_axis(x, row ^ distance, axis=0, mode="promise_in_bounds")

    distance = 1
    while distance < U:
        tiles = [x + beside(x, distance) for x in tiles]
        distance *= 2
    return jnp.concatenate([beside(x, U) for x in tiles], axis=0)
