"""Building blocks of the TPU kernels: products, sums and inverses of one chunk in VMEM.

Every function takes and returns values, not references, and uses only what Mosaic lowers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import devices

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products inside a TPU kernel, each with a stated rounding; sums are float32.

    Operands are cut into bfloat16 terms explicitly, never by a device's default precision, so that
    an interpreted kernel rounds as a compiled one does. In every method `axes` gives the axis of x
    and the axis of y that are summed over.

    narrow: whether the call's inputs are bfloat16. They then go to the matrix unit as they are, and
      float32 results computed from them as sums of bfloat16 terms. Otherwise operands are float32
      and products have the highest precision.
    exact: whether `state` rounds once, for float32 calls whose rounding errors may never fade (see
      `ops/delta_rule/compensated.py`).
    """

    narrow: bool
    exact: bool = False

    @property
    def dtype(self):
        """Returns the dtype in which kernels read the call's inputs."""
        return jnp.dtype(jnp.bfloat16 if self.narrow else jnp.float32)

    def terms(self, x, count=2):
        """Cuts x into a list of `count` bfloat16 terms of 8 bits each, largest first. A bfloat16 x
        is its own only term; without `narrow`, x in float32 is."""
        return _terms(x, count) if self.narrow else [x.astype(jnp.float32)]

    def dot(self, x, y, axes=(1, 0), terms=2):
        """Multiplies x and y, each cut into `terms` bfloat16 terms: by default to 16 bits.

        The product of the two smaller terms (2^-16 of the whole) is left out. One term per operand
        costs up to twice the suite's 2e-2 at the worst position of a gradient of the delta rule.
        """
        x, y = self.terms(x, terms), self.terms(y, terms)
        products = [
            _dot(x[i], y[n - i], axes)
            for n in range(terms)
            for i in range(n + 1)
            if i < len(x) and n - i < len(y)
        ]
        # Smallest first.
        return sum(reversed(products[:-1]), start=products[-1])

    def rounded(self, x, y, axes=(1, 0)):
        """Multiplies x and y, each rounded once to the dtype of the call's inputs."""
        return self.dot(x, y, axes, terms=1)

    def precise(self, x, y, axes=(1, 0)):
        """Multiplies x and y to 24 bits, as inverses need: they may magnify errors hundredfold."""
        return self.dot(x, y, axes, terms=3)

    def state(self, x, y, axes=(1, 0)):
        """Multiplies x and y to 24 bits, or if `exact` with one rounding. For products that carry a
        state from one chunk to the next."""
        return sum(self.exact_product(x, y, axes)) if self.exact else self.precise(x, y, axes)

    def ones(self, where):
        """Casts a boolean mask to 0 and 1 in the inputs' dtype, for sums by matrix products."""
        return where.astype(self.dtype)

    def exact_product(self, x, y, axes, y_squares=None):
        """Returns x y for float32 arrays as two terms, to be added by the caller.

        The first is the exact product of the leading 11 bits of x and y, the second the small rest.

        y_squares: sums of y^2 that give the magnitude of y, per entry; None sums over the
          contracted axis. In sums over tokens (axes (0, 0)) the tokens of other documents, whose
          products are 0, then do not change how the rest is rounded.
        """
        if y_squares is None:
            if axes == (0, 0):
                x, y = _where_any(y, x), _where_any(x, y)
            y_squares = _squares(y, axes[1])
        x_head, y_head = _head(x, _squares(x, axes[0])), _head(y, y_squares)
        rest = _dot(x - x_head, y, axes) + _dot(x_head, y - y_head, axes)
        return _dot(x_head, y_head, axes), rest


def _terms(x, count):
    """Cuts x into bfloat16 terms, largest first: x itself if it is bfloat16, else `count` terms.

    An interpreted kernel gets float32 arrays of the same values: XLA's CPU backend refuses some
    bfloat16 products and drops a conversion to bfloat16 and back, but not `reduce_precision`.
    """
    interpreting = devices.interpreting()
    if x.dtype == jnp.bfloat16:
        return [x.astype(jnp.float32) if interpreting else x]
    terms = []
    for n in range(count):
        if n:
            x = x - terms[-1].astype(jnp.float32)
        narrowed = jax.lax.reduce_precision(x, 8, 7) if interpreting else x.astype(jnp.bfloat16)
        terms.append(narrowed)
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
    """Zeroes the rows of x (C, ...) for which the same row of `rows` (C, ...) is all 0."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)  # squares of 1e-22 are 0
    return jnp.where(largest > 0, x, 0.0)


def _head(x, squares):
    """Rounds x to multiples of 2^-10 times the power of two at or below its norm. squares: the
    norm's square."""
    norm = jnp.sqrt(squares)
    bits = jax.lax.bitcast_convert_type(norm, jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    unit = jnp.maximum(power, 2.0**-64) * 2.0**-10
    return jnp.round(x / unit) * unit


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(C: int, strict: bool = False):
    """Returns the mask (C, C) that is true where j <= i, or with `strict` where j < i."""
    i, j = iota((C, C), 0), iota((C, C), 1)
    return j < i if strict else j <= i


def in_turns(generators):
    """Runs generators side by side, each up to its next `yield` in turn; lists their return values.

    One head's products wait for one another, and those of other heads fill the gaps, but only where
    the kernel's operations come in that order: the compiler moves them little.
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


INVERSE_BLOCK = 32  # tokens of a diagonal block that is inverted by substitution


def inverse(products: Products, A_CC):
    """Computes (I + A)^-1 in float32 for A strictly lower triangular. A generator, for `in_turns`.

    Diagonal blocks are inverted by substitution on the vector unit, all blocks of a chunk side by
    side in the lanes. Then neighbouring blocks are joined, [X1 0; Y X2] with Y = -X2 A21 X1, by two
    products per level, to 24 bits (docs/math/delta_rule.md, "The inverse").
    """
    C = A_CC.shape[0]
    U = min(C, INVERSE_BLOCK)
    X_CC = yield from _block_inverse(A_CC, U)
    while U < C:
        X_CC = yield from _joined(products, A_CC, X_CC, U)
        U *= 2
    return X_CC


def _joined(products, A_CC, X_CC, U):
    """Joins the inverses of diagonal blocks of U tokens to inverses of blocks of 2 U tokens. X_CC:
    block-diagonal inverses of I + A. A generator, for `in_turns`."""
    C = A_CC.shape[0]
    if 2 * U == C:
        # One pair is left: its quarters alone are multiplied.
        X1, X2 = X_CC[:U, :U], X_CC[U:, U:]
        Y = products.precise(A_CC[U:, :U], X1)
        yield
        Y = -products.precise(X2, Y)
        yield
        top = jnp.concatenate([X1, jnp.zeros_like(Y)], axis=1)
        return jnp.concatenate([top, jnp.concatenate([Y, X2], axis=1)], axis=0)
    # All pairs at once: A21 of each pair, zero elsewhere, between the block-diagonal inverses.
    i, j = iota((C, C), 0) // U, iota((C, C), 1) // U
    below = (i == j + 1) & (i % 2 == 1)
    Y_CC = products.precise(jnp.where(below, A_CC, 0.0), X_CC)
    yield
    Y_CC = products.precise(X_CC, Y_CC)
    yield
    return X_CC - Y_CC


def _block_inverse(A_CC, U):
    """Inverts the U x U diagonal blocks of I + A; the result (C, C) is zero elsewhere. A generator,
    for `in_turns`."""
    C = A_CC.shape[0]
    width = min(C, LANES)
    strips = []
    for first in range(0, C, width):
        strip = yield from _strip_inverse(A_CC[first : first + width, first : first + width], U)
        left = [jnp.zeros((width, first), jnp.float32)] if first else []
        columns = C - first - width
        right = [jnp.zeros((width, columns), jnp.float32)] if columns else []
        strips.append(jnp.concatenate([*left, strip, *right], axis=1) if width < C else strip)
    return jnp.concatenate(strips, axis=0) if width < C else strips[0]


def _strip_inverse(A_CC, U):
    """Inverts the U x U diagonal blocks of I + A (C, C) for C up to 128, by substitution. Row by
    row in all blocks at once, each block in its own lanes. A generator, for `in_turns`."""
    C = A_CC.shape[0]
    step = min(U, SUBLANES)
    lane = iota((step, C), 1)
    block = lane // U

    def own(rows, b):
        return jnp.where(block == b, rows, 0.0)

    # Row t of every block, side by side: A, and the identity that becomes its inverse.
    A_tiles, X_tiles = [], []
    for t in range(0, U, step):
        parts = [own(A_CC[b * U + t : b * U + t + step], b) for b in range(C // U)]
        A_tiles.append(sum(parts[1:], start=parts[0]))
        X_tiles.append(jnp.where(lane % U == iota((step, C), 0) + t, 1.0, 0.0))
    # Substitution: once row j of the inverse is known, later rows lose A_ij times it.
    for j in range(U - 1):
        row = X_tiles[j // step][j % step : j % step + 1]
        for t in range((j + 1) // step, U // step):
            factor = jnp.take_along_axis(
                A_tiles[t], block * U + j, axis=1, mode="promise_in_bounds"
            )
            X_tiles[t] = X_tiles[t] - factor * row
        yield
    # Back to a block diagonal matrix.
    rows = [own(X_tiles[t], b) for b in range(C // U) for t in range(U // step)]
    return jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]


def row_sums(x):
    return jnp.sum(x, axis=1, keepdims=True)


def row_of(x_C1):
    """Transposes a column (C, 1) to a row (1, C), by a masked sum."""
    C = x_C1.shape[0]
    return jnp.sum(jnp.where(_diagonal(C), x_C1, 0.0), axis=0, keepdims=True)


def column_of(x_1C):
    """Transposes a row (1, C) to a column (C, 1), by a masked sum."""
    return row_sums(jnp.where(_diagonal(x_1C.shape[1]), x_1C, 0.0))


def _diagonal(C):
    return iota((C, C), 0) == iota((C, C), 1)


def halving_sums(g_CK):
    """Sums log decay per channel (C, K) over a chunk and over its halves, their halves, and so on.

    C is a power of two. A block's sums are those of its halves plus the total of one half, so that
    each is an addition of non-positive numbers only (docs/math/linear_attention.md, "Per channel").

    Returns:
      g_cumsum_CK and g_reversed_CK of the chunk; then for halves of U = 1, 2, 4, ..., C/2 tokens
      one array: g_reversed of a left half (after a token to the half's end), g_cumsum of a right
      half (from the half's start through the token).
    """
    C = g_CK.shape[0]
    g_cumsum_CK, g_reversed_CK, levels = g_CK, jnp.zeros_like(g_CK), []
    U = 1
    while U < C:
        right = _in_right_half(g_CK, U)
        levels.append(jnp.where(right, g_cumsum_CK, g_reversed_CK))
        # A right half's g_cumsum gains the left half's total, a left half's g_reversed the right's.
        sibling_CK = _sibling_last(g_cumsum_CK, U)
        g_cumsum_CK = jnp.where(right, g_cumsum_CK + sibling_CK, g_cumsum_CK)
        g_reversed_CK = jnp.where(right, g_reversed_CK, g_reversed_CK + sibling_CK)
        U *= 2
    return g_cumsum_CK, g_reversed_CK, *levels


def halving_sums_cotangent(dg_cumsum_CK, dg_reversed_CK, dlevels):
    """Computes the cotangent of g_CK from those of the results of `halving_sums` (its transpose).
    dlevels: cotangents of the arrays for halves of 1, 2, 4, ..., C/2 tokens."""
    dg_CK = jnp.zeros_like(dg_cumsum_CK)
    U = dg_cumsum_CK.shape[0]
    for dlevel_CK in reversed(dlevels):
        U //= 2
        right = _in_right_half(dg_CK, U)
        # The total of a half was added to every sum of the half beside it that crosses it.
        dg_CK = dg_CK + _sibling_total(jnp.where(right, dg_cumsum_CK, dg_reversed_CK), U)
        dg_cumsum_CK = jnp.where(right, dg_cumsum_CK + dlevel_CK, dg_cumsum_CK)
        dg_reversed_CK = jnp.where(right, dg_reversed_CK, dg_reversed_CK + dlevel_CK)
    return dg_CK + dg_cumsum_CK


def _in_right_half(x_CK, U):
    return iota(x_CK.shape, 0) & U > 0


def _sibling_last(x_CK, U):
    """Returns for every token the last row of x in the half beside its own half of U tokens."""
    if U >= SUBLANES:
        return _from_sibling(x_CK, U, lambda x: x[:, :, U - 1 :])
    row = iota((SUBLANES, x_CK.shape[1]), 0)
    last = ((row // U) ^ 1) * U + U - 1
    return jnp.concatenate([_rows(x, last) for x in _register_rows(x_CK)], axis=0)


def _sibling_total(x_CK, U):
    """Returns for every token the sum of x over the half beside its own half of U tokens."""
    if U >= SUBLANES:
        return _from_sibling(x_CK, U, lambda x: jnp.sum(x, axis=2, keepdims=True))
    row = iota((SUBLANES, x_CK.shape[1]), 0)
    tiles = _register_rows(x_CK)
    # Sums over 2, 4, ..., U rows, by adding the row at each distance.
    distance = 1
    while distance < U:
        tiles = [x + _rows(x, row ^ distance) for x in tiles]
        distance *= 2
    return jnp.concatenate([_rows(x, row ^ U) for x in tiles], axis=0)


def _from_sibling(x_CK, U, reduce):
    """Applies `reduce` to each half of U tokens and gives its result to the other half's tokens.
    reduce: takes x as (pairs, 2, U, K) to (pairs, 2, 1, K). U is at least a register's 8 rows."""
    C, K = x_CK.shape
    row = reduce(x_CK.reshape(C // (2 * U), 2, U, K))
    swapped = jnp.concatenate([row[:, 1:], row[:, :1]], axis=1)
    return jnp.broadcast_to(swapped, (C // (2 * U), 2, U, K)).reshape(C, K)


def _register_rows(x_CK):
    return [x_CK[t : t + SUBLANES] for t in range(0, x_CK.shape[0], SUBLANES)]


def _rows(x, index):
    return jnp.take_along_axis(x, index, axis=0, mode="promise_in_bounds")
