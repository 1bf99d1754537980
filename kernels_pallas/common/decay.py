"""Log decay: its kinds, and its sums inside a chunk, stable by construction.

A chunked recurrence needs, for tokens j < i of one chunk, D_ij = exp(g_{j+1} + ... + g_i), with
every log decay g <= 0. A difference of two cumulative sums loses all digits where the decay is
strong, and exp(g_cumsum_i) exp(-g_cumsum_j) overflows. Here nothing is subtracted. A log decay that
forgets everything, -inf or any number whose exponential is 0 in float64 too, is first replaced by
the finite `RESET` (`arguments.normal_log_decay`), so that no sum overflows and no product is 0 inf.

A chunk is halved again and again. Two tokens j < i are separated at exactly one level, where j lies
in the left half of a block and i in its right half, and there

    g_{j+1} + ... + g_i  =  g_reversed_j + g_cumsum_i,
    g_reversed_j  =  the sum over the tokens after j up to the middle of that block,
    g_cumsum_i    =  the sum from the middle up to and with i,

two pure sums of numbers <= 0. Both exponentials are at most 1; a reset gives 0 with derivative 0.
For a decay per channel the scores of a level's pairs (i, j) are one matrix product of the form (q
exp(g_cumsum)) (k exp(g_reversed))^T, so that no (C, C, K) array of pairs exists.

The same division in two levels (blocks of 16, pairs inside them one by one) is "secondary chunking"
in GLA (arXiv 2312.06635, section 4.3). Arrays are (..., C, K) with K = 1 for a decay per head or
token; the chunk length C is a power of two. docs/math/linear_attention.md derives all of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.common import checks, dtypes, matmul, segments
from kernels_pallas.common.dtypes import custom_vjp


class Level(NamedTuple):
    """Sums of log decay at one level of a chunk's halving: M blocks of two halves of U tokens.

    g_cumsum_MUK: for token i of a right half, the sum from the block's middle up to and with i.
    g_exclusive_MUK: the same without token i.
    g_reversed_MUK: for token j of a left half, the sum over the tokens after j up to the middle.
    """

    g_cumsum_MUK: jax.Array
    g_exclusive_MUK: jax.Array
    g_reversed_MUK: jax.Array


class Sums(NamedTuple):
    """Sums of log decay over ranges of one chunk's tokens.

    log_decay_CK: the log decay itself.
    g_cumsum_CK: from the chunk's start up to and with token i: how far the entering state has
      decayed at i.
    g_exclusive_CK: the same without token i, for recurrences that read before the state decays.
    g_reversed_CK: over the tokens after j up to the chunk's end: how far what token j wrote has
      decayed there.
    g_total_K: over the whole chunk: how far the entering state has decayed at its end.
    levels: a `Level` per level of halving, smallest halves first; empty where not asked for.
    """

    log_decay_CK: jax.Array
    g_cumsum_CK: jax.Array
    g_exclusive_CK: jax.Array
    g_reversed_CK: jax.Array
    g_total_K: jax.Array
    levels: tuple[Level, ...]


SHARD_BLOCK = 128  # tokens of a shard whose sums are one matrix product
LARGEST_CONSTANT = 256  # tokens of a chunk whose pairs may be constants of a program
BLOCK = 16  # sums inside a block go token by token; longer ones add the sums of whole blocks
RESET = -1e3  # the least log decay, that of a reset: its exponential is 0 in float64 too


def kind(log_decay, *, segment_ids=None) -> str:
    """Returns the kind of a log decay: "none", "per_head", "per_token" or "per_channel".

    Args:
      log_decay: None ("none"), (H,) ("per_head"), (B, T, H) or (B, T, H, 1) ("per_token"), or
        (B, T, H, K) ("per_channel"); in chunks, where (..., C, K or 1) has more axes, too.
      segment_ids: for kernels, which write a document's first token as a reset, so that documents
        without a decay are "per_token".
    """
    if log_decay is None:
        return "none" if segment_ids is None else "per_token"
    if log_decay.ndim == 1:
        return "per_head"
    return "per_channel" if log_decay.ndim > 3 and log_decay.shape[-1] > 1 else "per_token"


def with_resets(log_decay_BTHK, segment_ids_BT, dtype, heads: int = 1):
    """Returns the log decay of packed documents: each document's first token is a reset.

    log_decay_BTHK: (B, T, H, K or 1), or None, which decays nothing and stays None where
      segment_ids_BT is None too; else (B, T, heads, 1) of `dtype` comes back.
    """
    if segment_ids_BT is None:
        return log_decay_BTHK
    if log_decay_BTHK is None:
        log_decay_BTHK = jnp.zeros_like(
            segment_ids_BT, dtype, shape=(*segment_ids_BT.shape, heads, 1)
        )
    starts_BT = segments.starts(segment_ids_BT)
    return jnp.where(starts_BT[:, :, None, None], RESET, log_decay_BTHK)


def factors(operator: str, decay_BTD, log_decay, shape_BTD, dtype) -> jax.Array:
    """The factors of `diagonal_scan`, (B, T, D) of `dtype`: decay_BTD, or exp(log_decay).

    Raises ValueError, with checks on, where a log decay is positive.
    """
    if log_decay is not None:
        checks.not_positive(operator, "log_decay", jnp.real(log_decay))
        decay_BTD = jnp.exp(log_decay.astype(dtypes.common(log_decay.dtype, jnp.float32)))
    decay_BTD = jnp.asarray(decay_BTD.astype(dtype))
    return jnp.broadcast_to(decay_BTD if decay_BTD.ndim == 3 else decay_BTD[None, None], shape_BTD)


def per_channel(log_decay_BTHK, segment_ids_BT, shape_BTHK, dtype) -> jax.Array:
    """Returns the log decay broadcast to (B, T, H, K), with `RESET` where documents start.

    log_decay_BTHK: (B, T, H, K or 1), or None for zeros. shape_BTHK: the result's shape.
    """
    log_decay_BTHK = with_resets(log_decay_BTHK, segment_ids_BT, dtype)
    zero = jnp.zeros((), dtype)
    return jnp.broadcast_to(zero if log_decay_BTHK is None else log_decay_BTHK, shape_BTHK)


def chunk_sums(log_decay_CK: jax.Array, *, levels: bool = True) -> Sums:
    """Returns the `Sums` of log decay (..., C, K), C a power of two, entries in [RESET, 0].

    levels: whether to compute the sums of each level of halving, which `decayed_scores` needs and
      `pair_decay` does not.
    """
    *lead, C, K = log_decay_CK.shape
    if C & (C - 1):
        raise ValueError(f"chunk_sums: the chunk length must be a power of two; got {C}")
    U = min(C, BLOCK)
    if not levels:
        sums = _sums_of(_summed_tokens(C, log_decay_CK.dtype, levels=False), log_decay_CK)
        cumsum, exclusive, reversed_ = sums
        return Sums(log_decay_CK, cumsum, exclusive, reversed_, cumsum[..., -1, :], ())
    tokens = _halvings(log_decay_CK.reshape(*lead, C // U, U, K))
    blocks = _halvings(tokens.g_total_K)

    def whole(of_token, of_block):
        return (of_token + of_block[..., None, :]).reshape(*lead, C, K)

    of_chunk = [
        Level(*(x.reshape(*lead, -1, *x.shape[-2:]) for x in level)) for level in tokens.levels
    ]
    for level in blocks.levels:
        M = level.g_exclusive_MUK.shape[-3]

        def half(of_token, of_block, right, M=M):
            of_token = of_token.reshape(*lead, M, 2, -1, U, K)[..., right, :, :, :]
            return (of_token + of_block[..., None, :]).reshape(*lead, M, -1, K)

        of_chunk.append(
            Level(
                half(tokens.g_cumsum_CK, level.g_exclusive_MUK, 1),
                half(tokens.g_exclusive_CK, level.g_exclusive_MUK, 1),
                half(tokens.g_reversed_CK, level.g_reversed_MUK, 0),
            )
        )
    return Sums(
        log_decay_CK,
        whole(tokens.g_cumsum_CK, blocks.g_exclusive_CK),
        whole(tokens.g_exclusive_CK, blocks.g_exclusive_CK),
        whole(tokens.g_reversed_CK, blocks.g_reversed_CK),
        blocks.g_total_K,
        tuple(of_chunk),
    )


def _halvings(log_decay_CK: jax.Array) -> Sums:
    """Returns `Sums` of log decay (..., C, K), by products with 0/1 matrices.

    XLA would recompute a chain of sums.
    """
    *lead, C, K = log_decay_CK.shape
    (g_cumsum_CK, *g_cumsum), (g_exclusive_CK, *g_exclusive), (g_reversed_CK, *g_reversed) = (
        _level_sums(log_decay_CK)
    )
    levels = []
    for level, halves in enumerate(zip(g_cumsum, g_exclusive, g_reversed)):
        shape = (*lead, C >> (level + 1), 1 << level, K)
        levels.append(Level(*(x.reshape(shape) for x in halves)))
    g_total_K = g_cumsum_CK[..., C - 1, :]
    return Sums(log_decay_CK, g_cumsum_CK, g_exclusive_CK, g_reversed_CK, g_total_K, tuple(levels))


@jax.custom_vjp
def _level_sums(log_decay_CK):
    """Returns g_cumsum, g_exclusive and g_reversed of log decay, each as [whole chunk, *levels]."""
    C = log_decay_CK.shape[-2]
    edges = [C + level * C // 2 for level in range(C.bit_length() - 1)]
    rows = _summed_tokens(C, log_decay_CK.dtype)
    return tuple(jnp.split(x, edges, axis=-2) for x in _sums_of(rows, log_decay_CK))


def _level_sums_backward(_, cotangents):
    # Batched by hand: to sum over a middle axis XLA's CPU backend (jaxlib 0.10.2) copies transposes
    C = cotangents[0][0].shape[-2]
    total_CK = 0.0
    for rows, pieces in zip(_summed_tokens(C, cotangents[0][0].dtype), cotangents):
        pieces = jnp.concatenate(pieces, axis=-2)
        rows = jnp.broadcast_to(rows.T, (*pieces.shape[:-2], *rows.T.shape))
        total_CK += jnp.matmul(rows, pieces, precision=jax.lax.Precision.HIGHEST)
    return (total_CK,)


_level_sums.defvjp(lambda log_decay_CK: (_level_sums(log_decay_CK), None), _level_sums_backward)


def _sums_of(summed_tokens, log_decay_CK) -> tuple[jax.Array, ...]:
    highest = jax.lax.Precision.HIGHEST
    return tuple(
        jnp.einsum("XC,...CK->...XK", rows, log_decay_CK, precision=highest)
        for rows in summed_tokens
    )


def _summed_tokens(C: int, dtype, levels: bool = True) -> tuple:
    """Returns three 0/1 matrices, whose products with log decay are the sums of `_level_sums`.

    Each has C rows for the whole chunk and, if `levels`, C/2 more for each level of halving.
    """
    s = _tokens(C)[None]
    return tuple(((first <= s) & (s <= last)).astype(dtype) for first, last in _bounds(C, levels))


def _tokens(C: int):
    """Returns 0 ... C-1, as a NumPy constant unless C is large, so that masks are constants too."""
    return (np if C <= LARGEST_CONSTANT else jnp).arange(C)


@functools.cache
def _bounds(C: int, levels: bool):
    """Returns (first, last), the tokens that each row of `_summed_tokens` sums, for three sums."""
    i = np.arange(C)
    g_cumsum, g_exclusive, g_reversed = [(0 * i, i)], [(0 * i, i - 1)], [(i + 1, 0 * i + C - 1)]
    for level in range(C.bit_length() - 1 if levels else 0):
        middle = (i >> (level + 1) << (level + 1)) + (1 << level)
        right = i & (1 << level) > 0
        g_cumsum.append((middle[right], i[right]))
        g_exclusive.append((middle[right], i[right] - 1))
        g_reversed.append((i[~right] + 1, middle[~right] - 1))
    return [
        tuple(np.concatenate(bounds)[:, None] for bounds in zip(*rows))
        for rows in (g_cumsum, g_exclusive, g_reversed)
    ]


def pair_decay(log_decay_C1: jax.Array, *, exclusive: bool = False) -> jax.Array:
    """Computes D_ij = exp(g_{j+1} + ... + g_i) for j <= i, else 0: (..., C, 1) to (..., C, C).

    With `exclusive` it is D_{i-1,j} = exp(g_{j+1} + ... + g_{i-1}) for j < i, with a diagonal of 0.
    For a decay per head or token all pairs can be formed: those inside one block of 16 from their
    own sums, others as a product of three exponentials, from the start of i's block to i, over the
    whole blocks between, and from after j to the end of j's block.

    Gradient of each token's log decay. D_ij depends on g_s exactly when j < s <= i, so
    dg_s = sum_{j < s <= i} dD_ij D_ij, one product with a matrix of zeros and ones.
    """
    return _pair_decay(log_decay_C1, exclusive)


@custom_vjp(1)
def _pair_decay(log_decay_C1, exclusive):
    *lead, C, _ = log_decay_C1.shape
    U = min(C, BLOCK)
    A = C // U
    # One leading axis: XLA's CPU backend (jaxlib 0.10.2) writes out of bounds in the derivative at
    # rank 7.
    g_AU = log_decay_C1.reshape(-1, A, U)
    # Pairs in one block
    same_AUU = jnp.where(_lower(U, -1 if exclusive else 0), sums_between(g_AU, exclusive), -jnp.inf)
    # Pairs in two blocks: up to i in its own, over whole blocks between, after j in its own
    exp_g_cumsum_AU = jnp.exp(jnp.cumsum(_delayed(g_AU) if exclusive else g_AU, axis=-1))
    exp_g_between_AA = jnp.exp(sums_between(jnp.sum(g_AU, axis=-1), exclusive=True))
    exp_g_reversed_AU = jnp.exp(jax.lax.cumsum(_advanced(g_AU), axis=g_AU.ndim - 1, reverse=True))
    apart_AUAU = exp_g_cumsum_AU[..., None, None] * (
        exp_g_between_AA[..., :, None, :, None] * exp_g_reversed_AU[..., None, None, :, :]
    )
    block = jnp.arange(A)
    earlier, same = (
        op(block[:, None, None, None], block[None, None, :, None])
        for op in (jnp.greater, jnp.equal)
    )
    apart_AUAU = jnp.where(earlier[None], apart_AUAU, 0.0)
    same_AUAU = jnp.exp(same_AUU)[..., :, :, None, :]
    D_AUAU = jnp.where(same[None], same_AUAU, apart_AUAU)
    return D_AUAU.reshape(*lead, C, C)


def _pair_decay_forward(log_decay_C1, exclusive):
    D_CC = _pair_decay(log_decay_C1, exclusive)
    return D_CC, D_CC


def _pair_decay_backward(exclusive, D_CC, dD_CC):
    C = D_CC.shape[-1]
    behind_CC = _lower(C, -1).T.astype(D_CC.dtype)  # j < t
    highest = jax.lax.Precision.HIGHEST
    pairs_CC = jnp.einsum("...ij,jt->...it", dD_CC * D_CC, behind_CC, precision=highest)
    up_to_CC = _lower(C, -1 if exclusive else 0)  # t <= i, or t < i
    return (jnp.sum(jnp.where(up_to_CC, pairs_CC, 0.0), axis=-2)[..., None],)


_pair_decay.defvjp(_pair_decay_forward, _pair_decay_backward)


def sums_between(g_U: jax.Array, exclusive: bool) -> jax.Array:
    """Computes g_{j+1} + ... + g_i (`exclusive`: ... + g_{i-1}) for j < i, else 0: (..., U, U)."""
    U = g_U.shape[-1]
    up_to_UU = _lower(U, -1 if exclusive else 0)  # s <= i, or s < i
    terms_UU = jnp.where(up_to_UU, g_U[..., None, :], 0.0)
    behind_UU = _lower(U, -1).astype(g_U.dtype)  # j < s
    return jnp.einsum("...is,sj->...ij", terms_UU, behind_UU, precision=jax.lax.Precision.HIGHEST)


def _lower(U: int, diagonal: int):
    token_U = _tokens(U)
    return token_U[None] - token_U[:, None] <= diagonal


def _delayed(g_U):
    return jnp.concatenate([jnp.zeros_like(g_U[..., :1]), g_U[..., :-1]], axis=-1)


def _advanced(g_U):
    return jnp.concatenate([g_U[..., 1:], jnp.zeros_like(g_U[..., :1])], axis=-1)


def naive_pair_decay(log_decay_CK: jax.Array, *, exclusive: bool = False) -> jax.Array:
    """Computes D_ij = exp(g_{j+1} + ... + g_i) of each channel: (..., C, K) to (..., C, C, K).

    D_ij is 0 for j > i. With `exclusive` it is D_{i-1,j}, as in `pair_decay`.
    """
    i, j, s = jnp.ogrid[tuple(slice(log_decay_CK.shape[-2]) for _ in range(3))]
    last = i - 1 if exclusive else i
    between_CCC = ((j < s) & (s <= last)).astype(log_decay_CK.dtype)
    sums_CCK = jnp.einsum("ijs,...sK->...ijK", between_CCC, log_decay_CK, precision="highest")
    up_to_CC1 = jnp.expand_dims((j <= last)[..., 0, None], tuple(range(sums_CCK.ndim - 3)))
    return jnp.where(up_to_CC1, jnp.exp(sums_CCK), 0.0)


def rectangle(q_MUK: jax.Array, k_MUK: jax.Array, rows_MUK, g_reversed_MUK) -> jax.Array:
    """Computes the scores of one level of halving, sum_K q_iK exp(rows_iK) k_jK exp(g_reversed_jK).

    q_MUK, rows_MUK: queries i of the blocks' right halves, and their sums of log decay.
    k_MUK, g_reversed_MUK: the same of keys j of left halves.
    """
    q_MUK, k_MUK = q_MUK * jnp.exp(rows_MUK), k_MUK * jnp.exp(g_reversed_MUK)
    if q_MUK.shape[-2] == 1:
        return matmul.sum_last(q_MUK * k_MUK)
    return matmul.einsum("...iK,...jK->...ij", q_MUK, k_MUK)


def decayed_scores(
    q_CK: jax.Array, k_CK: jax.Array, sums: Sums, *, exclusive: bool = False, rectangle=rectangle
) -> jax.Array:
    """Computes A_ij = q_i^T diag(D_ij) k_j for j <= i, else 0: (..., C, C), float32 or wider.

    Args:
      q_CK, k_CK: (..., C, K).
      sums: the result of `chunk_sums`, with levels, for a log decay (..., C, K or 1).
      exclusive: whether it is q_i^T diag(D_{i-1,j}) k_j, with a diagonal of 0.
      rectangle: the function that computes each level's scores.
    """
    *lead, C, K = q_CK.shape
    accumulate = dtypes.common(q_CK, k_CK, sums.g_cumsum_CK)
    q_CK, k_CK = q_CK.astype(accumulate), k_CK.astype(accumulate)
    diagonal = jnp.zeros((*lead, C, 1), accumulate) if exclusive else matmul.sum_last(q_CK * k_CK)
    rectangles = []
    for level in sums.levels:
        half = level.g_reversed_MUK.shape[-2]
        q_MUK = q_CK.reshape(*lead, -1, 2, half, K)[..., 1, :, :]
        k_MUK = k_CK.reshape(*lead, -1, 2, half, K)[..., 0, :, :]
        rows_MUK = level.g_exclusive_MUK if exclusive else level.g_cumsum_MUK
        rectangles.append(rectangle(q_MUK, k_MUK, rows_MUK, level.g_reversed_MUK))
    return _assemble(diagonal.reshape(*lead, C, 1, 1), rectangles)


def _assemble(diagonal, rectangles) -> jax.Array:
    """Joins a diagonal (..., C, 1, 1) and all levels' scores (..., M, U, U) to (..., C, C)."""
    blocks = diagonal
    for rectangle in rectangles:
        *lead, M, U, _ = rectangle.shape
        blocks = blocks.reshape(*lead, M, 2, U, U)
        top = jnp.concatenate([blocks[..., 0, :, :], jnp.zeros_like(rectangle)], axis=-1)
        bottom = jnp.concatenate([rectangle, blocks[..., 1, :, :]], axis=-1)
        blocks = jnp.concatenate([top, bottom], axis=-2)
    return blocks[..., 0, :, :]


def g_cumsum(log_decay_BTX: jax.Array) -> jax.Array:
    """Computes sums of log decay, g_1 + ... + g_t, for each token t of a shard (B, T, ...)."""
    return _shard_sums(log_decay_BTX, np.tri(SHARD_BLOCK), reverse=False)


def g_reversed(log_decay_BTX: jax.Array) -> jax.Array:
    """Computes sums of log decay, g_{t+1} + ... + g_T, for each token t of a shard (B, T, ...)."""
    return _shard_sums(log_decay_BTX, np.tri(SHARD_BLOCK, k=-1).T, reverse=True)


def _shard_sums(log_decay_BTX, rows_CC, reverse: bool):
    """Returns sums of log decay over time up to each token or, with `reverse`, after it.

    rows_CC: 0-1 matrix of which tokens of a block of C each sum takes.
    """
    (B, T, *X), C = log_decay_BTX.shape, SHARD_BLOCK
    padding = ((0, 0), (0, -T % C)) + ((0, 0),) * len(X)
    g_BNCX = jnp.pad(log_decay_BTX, padding).reshape(B, -1, C, *X)
    rows_CC = rows_CC.astype(g_BNCX.dtype)
    highest = jax.lax.Precision.HIGHEST
    sums_BNCX = jnp.einsum("CD,BND...->BNC...", rows_CC, g_BNCX, precision=highest)
    total_BNX = jnp.sum(g_BNCX, axis=2)
    none_B1X = jnp.zeros_like(total_BNX[:, :1])
    others = [total_BNX[:, 1:], none_B1X] if reverse else [none_B1X, total_BNX[:, :-1]]
    others_BNX = jax.lax.cumsum(jnp.concatenate(others, axis=1), axis=1, reverse=reverse)
    return (sums_BNCX + others_BNX[:, :, None]).reshape(B, -1, *X)[:, :T]
