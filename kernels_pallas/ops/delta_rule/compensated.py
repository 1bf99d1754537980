"""Compensated products in float32, for where a token's transition comes near a reflection.

With beta |k|^2 = 2 and little or no decay the transition is a reflection, which forgets nothing.
Where one key comes again and again, the same rounding error of k.k acts at every token, in one
direction, and after T tokens has grown to T times itself. Where that can happen, decided as the
program runs (`needed`), products are split into an exact term and a small rest, the rounding error
of A is kept beside A, and the triangular system is solved with one correction.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.common import branches, chunk_blocks, decay, matmul

# Compensation is needed where some beta |k|^2 is above this. An error's sum over time is
# beta / (2 - beta) times one token's: 1 for beta = 1, which is as far as a DeltaNet with positive
# eigenvalues goes (and the roundings of its |k|).
REFLECTING = 1.01
# And only where some state keeps more than LASTING over WINDOW tokens: else an error's sum stays
# below that of WINDOW / (1 - LASTING) tokens.
WINDOW, LASTING = 16, 1 / 4

precise = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def squared(x_BTHK):
    """Returns |x|^2, the squared norm over the last axis, in float32: (B, T, H)."""
    return matmul.sum_last(x_BTHK.astype(jnp.float32) ** 2)[..., 0]


def needed(sizes_BTH, log_decay_BTHK):
    """Returns a traced flag: whether some 16 tokens come near a reflection and decay little.

    Only there products must be compensated.

    Args:
      sizes_BTH: beta |k|^2 of each token, near 2 for a reflection; NaN counts as one.
      log_decay_BTHK: (B, T, H, K or 1), or None.
    """
    sizes_BTH, log_decay_BTHK = jax.lax.stop_gradient((sizes_BTH, log_decay_BTHK))
    reflects_BTH = ~(sizes_BTH <= REFLECTING)
    if log_decay_BTHK is None:
        return branches.anywhere(reflects_BTH)

    def windows(x):
        padding = (0, chunk_blocks.padding(x.shape[1], WINDOW))
        x = jnp.pad(x, ((0, 0), padding) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, WINDOW, *x.shape[2:])

    log_kept_BNH = jnp.max(jnp.sum(windows(log_decay_BTHK), axis=2), axis=-1)
    reflects_BNH = jnp.any(windows(reflects_BTH), axis=2)
    return branches.anywhere(reflects_BNH & (log_kept_BNH > math.log(LASTING)))


def product_rest(x_MBHCK, y_MBHCK):
    """Returns what to add to the rounded products x_i^T y_j: their error, itself in float32."""
    products = "...iK,...jK->...ij"
    exact, rest = _split_product(products, x_MBHCK, y_MBHCK)
    return (exact - jnp.einsum(products, x_MBHCK, y_MBHCK)) + rest


def decayed_rest(products, rest, D, sums):
    """Returns what to add to the rounded products * D, where `rest` is the same for `products`.

    D is exp(sums). expm1(sums) is used, which keeps the digits of 1 - D; 0 where products * D is 0.
    """
    used = _as_computed(products * D)
    return _unless_zero(used, ((products - used) + products * jnp.expm1(sums)) + rest * D)


def rectangle_rest(q_MUK, k_MUK, rows_MUK, g_reversed_MUK):
    """Returns what to add to the rounded scores that `decay.rectangle` gives: their error."""
    used = _as_computed(decay.rectangle(q_MUK, k_MUK, rows_MUK, g_reversed_MUK))
    products = "...iK,...jK->...ij"
    change = precise(products, q_MUK * jnp.expm1(rows_MUK), k_MUK)
    change += precise(products, q_MUK * jnp.exp(rows_MUK), k_MUK * jnp.expm1(g_reversed_MUK))
    exact, rest = _split_product(products, q_MUK, k_MUK)
    return _unless_zero(used, ((exact - used) + change) + rest)


def _as_computed(x):
    """Returns x as rounded elsewhere: a barrier keeps XLA from fusing it into a subtraction."""
    return jax.lax.optimization_barrier(x)


def _unless_zero(used, rest):
    """Returns `rest`, but 0 where `used`, which it corrects, is exactly 0, as between documents."""
    return jnp.where(used == 0, 0.0, rest)


def state_product(A_rest_CC):
    """Returns the einsum for products with states: jnp's if A_rest is None, else `rounded_once`."""
    return jnp.einsum if A_rest_CC is None else rounded_once


def rounded_once(subscripts, x, y) -> jax.Array:
    """Returns the einsum of x and y in float32, computed in two terms and rounded once."""
    main, rest = _split_product(subscripts, x, y)
    return main + rest


def solve(A_CC, A_rest_CC, X_CC, R_CV):
    """Solves (I + A) U = R for U, given X, the inverse of I + A.

    Where A's rounding error A_rest is given, U is corrected once by its residual.
    """
    U_CV = precise("...ij,...jV->...iV", X_CC, R_CV)
    if A_rest_CC is None:
        return U_CV
    # |U|^2 summed over the tokens that A links, so that a document's U is split the same whatever
    # stands in the others
    linked_CC = (A_CC != 0) | (jnp.swapaxes(A_CC, -1, -2) != 0)
    squares_CV = precise("...ij,...jV->...iV", linked_CC.astype(U_CV.dtype), U_CV**2) + U_CV**2
    # U <- U + X (R - U - A U), with A U as an exact part and a rest
    exact_CV, rest_CV = _split_product("...ij,...jV->...iV", A_CC, U_CV, squares_CV)
    rest_CV = rest_CV + precise("...ij,...jV->...iV", A_rest_CC, U_CV)
    residual_CV = R_CV - U_CV - exact_CV - rest_CV
    return U_CV + precise("...ij,...jV->...iV", X_CC, residual_CV)


def solve_transposed(A_CC, A_rest_CC, X_CC, R_CV):
    """Solves (I + A)^T U = R for U, given X, the inverse of I + A, and A's rounding error."""

    def transposed(x_CC):
        return x_CC if x_CC is None else jnp.swapaxes(x_CC, -1, -2)

    return solve(transposed(A_CC), transposed(A_rest_CC), transposed(X_CC), R_CV)


def _split_product(subscripts, x, y, y_squares=None):
    """Returns a float32 einsum as two terms to add: one without rounding error, and a small rest.

    The first multiplies x and y rounded to 11 bits, whose products and sums float32 holds exactly.
    y_squares: for each entry of y, the sum of squares that sets its unit of rounding; None is the
      sum over the axis that the einsum sums.
    """
    x_letters, y_letters = subscripts.split("->")[0].replace("...", "").split(",")
    (summed,) = set(x_letters) & set(y_letters) - set(subscripts.split("->")[1])
    x_axis, y_axis = (letters.index(summed) - len(letters) for letters in (x_letters, y_letters))

    def head(x, squares):
        _, exponent = jnp.frexp(jnp.sqrt(squares))
        unit = jnp.ldexp(jnp.ones((), x.dtype), jnp.maximum(exponent, -64) - 11)
        return jnp.round(x / unit) * unit

    if y_squares is None:
        met = jnp.any(x != 0, axis=-3 - x_axis, keepdims=True)  # elsewhere y is multiplied by 0
        y = jnp.where(met if x_axis == y_axis else jnp.swapaxes(met, -1, -2), y, 0)
        y_squares = jnp.sum(y**2, axis=y_axis, keepdims=True)
    x_head = head(x, jnp.sum(x**2, axis=x_axis, keepdims=True))
    y_head = head(y, y_squares)
    rest = precise(subscripts, x - x_head, y) + precise(subscripts, x_head, y - y_head)
    return precise(subscripts, x_head, y_head), rest
