"""Float32 where a token's transition comes near a reflection: what rounding loses is known, and
given back.

With beta |k|^2 = 2 and little or no decay the transition is a reflection: nothing ever fades, and
where one key comes again and again the same rounding error of k.k acts at every token, in one
direction, so that after T tokens it has grown to T times itself. Where that can happen, decided as
the program runs (`occur`), products are split into a part that is exact and a small rest, what A
lost to rounding is kept beside it, and the triangular system is solved with one correction.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels_pallas.common import branches, chunk_blocks, decay, matmul

# Rounding is held down where some beta |k|^2 is above this. An error's sum over time is beta / (2 -
# beta) of one token's: itself up to 1, which is as far as a DeltaNet with positive eigenvalues goes
# (and the roundings of its |k|).
REFLECTING = 1.01
# And only where some state keeps more than KEPT over WINDOW tokens: else an error's sum stays below
# that of WINDOW / (1 - KEPT) tokens.
WINDOW, KEPT = 16, 1 / 4

precise = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def squared(x_BTHK):
    """|x|^2, in float32: (B, T, H)."""
    return matmul.sum_last(x_BTHK.astype(jnp.float32) ** 2)[..., 0]


def needed(sizes_BTH, log_decay_BTHK):
    """Whether rounding must be held down: some window of tokens reflects (beta |k|^2 is `sizes`),
    and forgets little."""
    sizes_BTH, log_decay_BTHK = jax.lax.stop_gradient((sizes_BTH, log_decay_BTHK))
    reflects_BTH = ~(sizes_BTH <= REFLECTING)  # what is not a number does
    if log_decay_BTHK is None:
        return branches.anywhere(reflects_BTH)

    def windows(x):
        x = jnp.pad(
            x, ((0, 0), (0, chunk_blocks.padding(x.shape[1], WINDOW))) + ((0, 0),) * (x.ndim - 2)
        )
        return x.reshape(x.shape[0], -1, WINDOW, *x.shape[2:])

    kept_BNH = jnp.max(jnp.sum(windows(log_decay_BTHK), axis=2), axis=-1)
    reflects_BNH = jnp.any(windows(reflects_BTH), axis=2)
    return branches.anywhere(reflects_BNH & (kept_BNH > math.log(KEPT)))


def lost_product(rows_MBHCK, columns_MBHCK):
    """What float32 loses of rows columns^T, to float32's own precision."""
    products = "...iK,...jK->...ij"
    exact, rest = _split_product(products, rows_MBHCK, columns_MBHCK)
    return (exact - jnp.einsum(products, rows_MBHCK, columns_MBHCK)) + rest


def lost_decayed(scores, lost, D, sums):
    """What scores D has lost where the scores have lost `lost`, and D = exp(sums).

    From 1 - D, which float32 knows to more digits than D where D is near 1.
    """
    used = _as_computed(scores * D)
    return _unless_zero(used, ((scores - used) + scores * jnp.expm1(sums)) + lost * D)


def lost_rectangle(q_MUK, k_MUK, rows_MUK, g_reversed_MUK):
    """The same of `decay_sums.rectangle`."""
    used = _as_computed(decay.rectangle(q_MUK, k_MUK, rows_MUK, g_reversed_MUK))
    products = "...iK,...jK->...ij"
    change = precise(products, q_MUK * jnp.expm1(rows_MUK), k_MUK)
    change += precise(products, q_MUK * jnp.exp(rows_MUK), k_MUK * jnp.expm1(g_reversed_MUK))
    exact, rest = _split_product(products, q_MUK, k_MUK)
    return _unless_zero(used, ((exact - used) + change) + rest)


def _as_computed(x):
    """Rounded, as it is where it is used: not fused into what takes it away again."""
    return jax.lax.optimization_barrier(x)


def _unless_zero(used, lost):
    """Tokens of two documents have lost nothing."""
    return jnp.where(used == 0, 0.0, lost)


def state_product(lost_CC):
    """An einsum for the products by which states become states: where something is lost, rounded
    once."""
    if lost_CC is None:
        return jnp.einsum
    return lambda subscripts, x, y: sum(_split_product(subscripts, x, y))


def solve(A_CC, lost_CC, X_CC, R_CV):
    """U of (I + A) U = R, from the inverse X of I + A; where A has lost something, with one
    correction by the residual."""
    U_CV = precise("...ij,...jV->...iV", X_CC, R_CV)
    if lost_CC is None:
        return U_CV
    # A unit of its own for every document's U: what is multiplied by 0 must not change how the rest
    # is rounded.
    linked_CC = (A_CC != 0) | (jnp.swapaxes(A_CC, -1, -2) != 0)
    squares_CV = precise("...ij,...jV->...iV", linked_CC.astype(U_CV.dtype), U_CV**2) + U_CV**2
    exact_CV, rest_CV = _split_product("...ij,...jV->...iV", A_CC, U_CV, squares_CV)
    rest_CV = rest_CV + precise("...ij,...jV->...iV", lost_CC, U_CV)
    residual_CV = R_CV - U_CV - exact_CV - rest_CV
    return U_CV + precise("...ij,...jV->...iV", X_CC, residual_CV)


def solve_transposed(A_CC, lost_CC, X_CC, R_CV):
    """U of (I + A)^T U = R."""

    def transposed(x_CC):
        return x_CC if x_CC is None else jnp.swapaxes(x_CC, -1, -2)

    return solve(transposed(A_CC), transposed(lost_CC), transposed(X_CC), R_CV)


def _split_product(subscripts, x, y, y_squares=None):
    """x y in float32 as two terms: of heads of 11 bits, whose products and sums are exact, and the
    small rest.

    y_squares: sums of y^2 that say how large y is, for each of its entries; None: those over all
      that is summed.
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
