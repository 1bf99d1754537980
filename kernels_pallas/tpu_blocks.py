"""What goes on inside the TPU kernels of the matrix recurrences: products, sums and inverses of one chunk in VMEM.

Everything here takes and returns values, not references, and stands for a kernel's body: only what Mosaic lowers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import targets

LANES = 128
SUBLANES = 8
NEVER = -1e30  # a reset inside a sum: exp(NEVER) is 0 as exp(-inf) is, and 0 * NEVER is 0


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products in a kernel, with the rounding said each time.

    narrow: the inputs are bfloat16. Operands go to the matrix unit as sums of bfloat16 terms, one for `coarse`, two for
      `fine` (what is left out of a product is 2^-16 of it). Otherwise operands are float32 and products at the highest
      precision.
    exact: float32 without a decay, where rounding errors never fade: `state` rounds once (see `chunked._lost`).
    axes: which axis of x and of y is summed over.

    The terms are cut explicitly, never left to a device's default precision, so an interpreted kernel rounds as a
    compiled one does.
    """

    narrow: bool
    exact: bool = False

    def coarse(self, x, y, axes=(1, 0)):
        return self._product(x, y, axes, 1)

    def fine(self, x, y, axes=(1, 0)):
        return self._product(x, y, axes, 2)

    def state(self, x, y, axes=(1, 0)):
        return sum(self.exact_product(x, y, axes)) if self.exact else self.fine(x, y, axes)

    def sums(self, mask, g, axes=(1, 0)):
        """A product with zeros and ones, `mask`: sums of g's entries, to float32's precision or to 16 bits."""
        return self._product(mask, g, axes, 2)

    def _product(self, x, y, axes, terms):
        if not self.narrow:
            return _dot(x.astype(jnp.float32), y.astype(jnp.float32), axes)
        pairs = [
            _dot(a, b, axes)
            for i, a in enumerate(_terms(x, terms))
            for j, b in enumerate(_terms(y, terms))
            if i + j < terms
        ]
        return sum(reversed(pairs[1:]), start=pairs[0]) if len(pairs) > 1 else pairs[0]

    def exact_product(self, x, y, axes):
        """A float32 product as two terms: of heads of 11 bits, whose products and sums are exact, and the small rest."""
        x_head, y_head = (_head(z, axis) for z, axis in zip((x, y), axes))
        rest = _dot(x - x_head, y, axes) + _dot(x_head, y - y_head, axes)
        return _dot(x_head, y_head, axes), rest


def _terms(x, count):
    """x as a sum of at most `count` bfloat16 arrays, largest first."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    terms = []
    for left in reversed(range(count)):
        terms.append(x.astype(jnp.bfloat16))
        if left:
            x = x - _rounded(x)
    return tuple(terms)


def _rounded(x):
    """x to bfloat16 and back. XLA on a CPU drops such a pair of conversions, but not this operation."""
    if targets.interpreting():
        return jax.lax.reduce_precision(x, 8, 7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def _dot(x, y, axes):
    if x.dtype == jnp.bfloat16 and targets.interpreting():  # which XLA's CPU backend may refuse
        x, y = (z.astype(jnp.float32) for z in (x, y))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _head(x, axis):
    """x rounded to 11 bits below the power of two that its norm along `axis` reaches."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))
    bits = jax.lax.bitcast_convert_type(norm, jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    unit = jnp.maximum(power, 2.0**-64) * 2.0**-10
    return jnp.round(x / unit) * unit


def finite(log_decay):
    """-inf as NEVER, so that sums by products with zeros and ones have no 0 * inf."""
    return jnp.where(log_decay == -jnp.inf, NEVER, log_decay)


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(C: int, diagonal: int = 0):
    """True at (i, j) where j <= i + diagonal."""
    return iota((C, C), 1) <= iota((C, C), 0) + diagonal


BLOCK = 32


def inverse(products: Products, A_CC):
    """(I + A)^{-1} for A strictly lower triangular, in float32.

    Diagonal blocks of 32 by substitution on the vector unit, all of a chunk's side by side in the lanes; then neighbours
    are joined, [X1 0; Y X2] with Y = -X2 A21 X1, by two products a level, at `fine` precision.
    """
    C = A_CC.shape[0]
    U = min(C, BLOCK)
    X_CC = _block_inverse(A_CC, U)
    while U < C:
        X_CC = _joined(products, A_CC, X_CC, U)
        U *= 2
    return X_CC


def _joined(products, A_CC, X_CC, U):
    C = A_CC.shape[0]
    if 2 * U == C:
        X1, X2 = X_CC[:U, :U], X_CC[U:, U:]
        Y = -products.fine(X2, products.fine(A_CC[U:, :U], X1))
        top = jnp.concatenate([X1, jnp.zeros_like(Y)], axis=1)
        return jnp.concatenate([top, jnp.concatenate([Y, X2], axis=1)], axis=0)
    i, j = iota((C, C), 0) // U, iota((C, C), 1) // U
    below = (i == j + 1) & (i % 2 == 1)
    return X_CC - products.fine(X_CC, products.fine(jnp.where(below, A_CC, 0.0), X_CC))


def _block_inverse(A_CC, U):
    """The inverses of the U x U diagonal blocks of I + A, zero elsewhere."""
    C = A_CC.shape[0]
    width = min(C, LANES)
    strips = []
    for first in range(0, C, width):
        strip = _strip_inverse(A_CC[first : first + width, first : first + width], U)
        before = [jnp.zeros((width, first), jnp.float32)] if first else []
        behind = C - first - width
        after = [jnp.zeros((width, behind), jnp.float32)] if behind else []
        strips.append(jnp.concatenate([*before, strip, *after], axis=1) if width < C else strip)
    return jnp.concatenate(strips, axis=0) if width < C else strips[0]


def _strip_inverse(A_CC, U):
    """The same for C of at most 128: row by row, the rows of all blocks at once, a block's columns in its own lanes."""
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
    rows = [own(X_tiles[t], b) for b in range(C // U) for t in range(U // step)]
    return jnp.concatenate(rows, axis=0) if len(rows) > 1 else rows[0]
