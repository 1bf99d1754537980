"""Float32 where a token's transition comes near a reflection: what rounding loses is known, and given back.

With beta |k|^2 = 2 and no decay the transition is a reflection: nothing ever fades, and where one key comes again and
again the same rounding error of k.k acts at every token, in one direction, so that after T tokens it has grown to T times
itself. Where that can happen, decided as the program runs (`carefully`), products are split into a part that is exact and
a small rest, what A lost to rounding is kept beside it, and the triangular system is solved with one correction.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import matmul

# Rounding is held down where some beta |k|^2 is above this. An error's sum over time is beta / (2 - beta) of one token's:
# itself up to 1, which is as far as a DeltaNet with positive eigenvalues goes (and the roundings of its |k|).
REFLECTING = 1.01

precise = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def squared(x_BTHK):
    """|x|^2, in float32: (B, T, H)."""
    return matmul.sum_last(x_BTHK.astype(jnp.float32) ** 2)[..., 0]


def above(sizes, limit: float):
    """Whether any is larger, or is not a number."""
    return ~jnp.all(jax.lax.stop_gradient(sizes) <= limit)


def carefully(reflects, run, *operands):
    """run(exact, *operands), exact where `reflects` holds. None: where a decay, or float64, makes it needless."""
    if reflects is None:
        return run(False, *operands)
    exactly, plainly = (functools.partial(run, exact) for exact in (True, False))
    return jax.lax.cond(reflects, exactly, plainly, *operands)


def lost_product(rows_MBHCK, columns_MBHCK):
    """What float32 loses of rows columns^T, to float32's own precision. It has no gradient."""
    rows_MBHCK, columns_MBHCK = jax.lax.stop_gradient((rows_MBHCK, columns_MBHCK))
    products = "MBHiK,MBHjK->MBHij"
    exact_MBHCC, rest_MBHCC = _split_product(products, rows_MBHCK, columns_MBHCK)
    return (exact_MBHCC - jnp.einsum(products, rows_MBHCK, columns_MBHCK)) + rest_MBHCC


def state_product(lost_CC):
    """An einsum for the products by which states become states: where something is lost, rounded once."""
    if lost_CC is None:
        return jnp.einsum
    return lambda subscripts, x, y: sum(_split_product(subscripts, x, y))


def solve(A_CC, lost_CC, X_CC, R_CV):
    """U of (I + A) U = R, from the inverse X of I + A; where A has lost something, with one correction by the residual."""
    U_CV = precise("...ij,...jV->...iV", X_CC, R_CV)
    if lost_CC is None:
        return U_CV
    exact_CV, rest_CV = _split_product("...ij,...jV->...iV", A_CC, U_CV)
    rest_CV = rest_CV + precise("...ij,...jV->...iV", lost_CC, U_CV)
    residual_CV = R_CV - U_CV - exact_CV - rest_CV
    return U_CV + precise("...ij,...jV->...iV", X_CC, residual_CV)


def solve_transposed(A_CC, lost_CC, X_CC, R_CV):
    """U of (I + A)^T U = R."""

    def transposed(x_CC):
        return x_CC if x_CC is None else jnp.swapaxes(x_CC, -1, -2)

    return solve(transposed(A_CC), transposed(lost_CC), transposed(X_CC), R_CV)


def _split_product(subscripts, x, y):
    """x y in float32 as two terms: of heads of 11 bits, whose products and sums are exact, and the small rest."""
    x_letters, y_letters = subscripts.split("->")[0].replace("...", "").split(",")
    (summed,) = set(x_letters) & set(y_letters) - set(subscripts.split("->")[1])

    def head(x, letters):
        axis = letters.index(summed) - len(letters)
        _, exponent = jnp.frexp(jnp.sqrt(jnp.sum(x**2, axis=axis, keepdims=True)))
        unit = jnp.ldexp(jnp.ones((), x.dtype), jnp.maximum(exponent, -64) - 11)
        return jnp.round(x / unit) * unit

    x_head, y_head = head(x, x_letters), head(y, y_letters)
    rest = precise(subscripts, x - x_head, y) + precise(subscripts, x_head, y - y_head)
    return precise(subscripts, x_head, y_head), rest
