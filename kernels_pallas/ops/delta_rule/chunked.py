"""The delta rule and the general diagonal-plus-low-rank recurrence, chunk by chunk, in plain XLA.

The equations, forward and backward, stand in docs/math/delta_rule.md under the names used here.
The vectors U_i that a chunk's tokens write depend on each other through a strictly lower triangular
matrix A, so one triangular solve (the WY or UT form: DeltaNet, arXiv 2406.06484, section 3.2; with
a decay, Gated DeltaNet, 2412.06464, section 3.3; per channel, Kimi Linear, 2510.26692, section 3)
makes each chunk an affine map of the state that enters it:

    delta rule   (I + A) U = beta v - (beta k exp(g_cumsum)) S
    general      (I + A) U = A' v + (b exp(g_exclusive)) S

`Chunks` holds these maps, whichever of the two they came from; one pass over the chunks, forward
and backward, serves both. A document's first token is a reset (`decay.RESET`), and its b reads
nothing. Without a decay and without documents nothing is multiplied by exponentials that are 1.

The chunks of a block are treated at once but for the state, which goes from one to the next; a scan
goes over the blocks. The backward pass saves the inputs and each chunk's entering state, recomputes
the maps of one block at a time, and takes the derivative of the pass by hand, of the maps by
`jax.vjp`. Chunks of 32: longer ones take more products and lose accuracy where beta is 2, shorter
ones store more states.

In float32, products are compensated where tokens' transitions come near reflections and little is
forgotten: see `compensated`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from kernels_pallas.common import (
    arguments,
    branches,
    chunk_blocks,
    decay,
    dtypes,
    matmul,
    remat,
    segments,
    triangular_inverse,
)
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.common.matmul import scaled
from kernels_pallas.ops.delta_rule import compensated

CHUNK = 32
ACCELERATOR_PAIRS = 64  # (chunk, head) pairs of a block


class Chunks(NamedTuple):
    """A block's chunks as affine maps of the state S_KV that enters: (M chunks, B, H, ...).

    A chunk's tokens write U, give outputs o and leave the state S':

        (I + A_CC) U = write_CV + read_CK S
        o = local_CV + q_CK S + Z_CC U
        S' = exp_g_total_K1 S + w_CK^T U + local_KV

    exp_g_total_K1: None where nothing decays.
    A_rest_CC: the rounding error of A_CC, where products are compensated; without gradient.
    """

    A_CC: jax.Array
    read_CK: jax.Array
    write_CV: jax.Array
    q_CK: jax.Array
    Z_CC: jax.Array
    w_CK: jax.Array
    exp_g_total_K1: jax.Array | None
    A_rest_CC: jax.Array | None = None
    local_CV: jax.Array | None = None
    local_KV: jax.Array | None = None


def run(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT,
    chunk_size=None, scale=1.0,
):  # fmt: skip
    """Computes the delta rule in chunks from normalised arguments; returns (o, the final state)."""
    log_decay_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, initial_state_BHKV.dtype)
    compensate = None
    if initial_state_BHKV.dtype == jnp.float32:
        squared_BTH = arguments.repeat_heads(compensated.squared(k_BTGK), v_BTHV.shape[2])
        sizes_BTH = dtypes.multiply(jnp.abs(beta_BTH), squared_BTH)
        compensate = compensated.needed(sizes_BTH, log_decay_BTHK)
    inputs = (q_BTGK, k_BTGK, v_BTHV, beta_BTH[..., None], log_decay_BTHK)
    form = _form(_delta_rule_chunks, q_BTGK.shape[-1], v_BTHV, chunk_size, scale)
    return _run(form, inputs, initial_state_BHKV, compensate)


def run_diagonal_plus_low_rank(
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT,
    chunk_size=None,
):  # fmt: skip
    """Computes diagonal plus low rank in chunks from normalised arguments; returns (o, state)."""
    if segment_ids_BT is not None:
        b_BTHK = jnp.where(segments.starts(segment_ids_BT)[:, :, None, None], 0.0, b_BTHK)
    log_decay_BTHK = decay.with_resets(log_decay_BTHK, segment_ids_BT, initial_state_BHKV.dtype)
    compensate = None
    if initial_state_BHKV.dtype == jnp.float32:
        squared_BTH = compensated.squared(a_BTHK) * compensated.squared(b_BTHK)
        compensate = compensated.needed(jnp.sqrt(squared_BTH), log_decay_BTHK)
    inputs = (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK)
    form = _form(_diagonal_plus_low_rank_chunks, q_BTHK.shape[-1], v_BTHV, chunk_size, 1.0)
    return _run(form, inputs, initial_state_BHKV, compensate)


class _Form(NamedTuple):
    """Static options of `_run`.

    chunks: the function that makes a block's `Chunks`. scale: multiplies q. C: tokens of a chunk, a
      power of two. M: chunks of a block.
    """

    chunks: Callable[..., Chunks]  # takes a block's inputs, each (M, B, heads, C, dim)
    scale: float
    C: int
    M: int


def _form(chunks, K, v_BTHV, chunk_size, scale) -> _Form:
    B, T, H, V = v_BTHV.shape
    C = chunk_blocks.chunk_length(CHUNK if chunk_size is None else chunk_size, T)
    M = chunk_blocks.chunks_per_block(
        -(-T // C), B * H, max(K, V), accelerator_pairs=ACCELERATOR_PAIRS
    )
    return _Form(chunks, scale, C, M)


def _delta_rule_chunks(
    q_MBGCK, k_MBGCK, v_MBHCV, beta_MBHC1, log_decay_MBHCK, *, compensate
) -> Chunks:
    """Returns `Chunks` with A_ij = beta_i k_i^T diag(D_ij) k_j and Z_ij = q_i^T diag(D_ij) k_j."""
    H = v_MBHCV.shape[2]
    sums = _decay_sums(log_decay_MBHCK)
    products = _decayed_products(sums, H)
    q_MBHCK, k_MBHCK = (arguments.repeat_heads(x, H) for x in (q_MBGCK, k_MBGCK))
    A_rest_MBHCC = None
    if compensate:
        A_rest_MBHCC = beta_MBHC1 * _A_rest(k_MBHCK, k_MBHCK, sums, exclusive=False)
    return Chunks(
        A_CC=scaled(jnp.tril(products(k_MBGCK, k_MBGCK), -1), beta_MBHC1),
        read_CK=_decayed(scaled(k_MBHCK, -beta_MBHC1), sums.g_cumsum_CK),
        write_CV=scaled(v_MBHCV, beta_MBHC1),
        q_CK=_decayed(q_MBHCK, sums.g_cumsum_CK),
        Z_CC=products(q_MBGCK, k_MBGCK),
        w_CK=_decayed(k_MBHCK, sums.g_reversed_CK),
        exp_g_total_K1=_exp_g_total(sums),
        A_rest_CC=A_rest_MBHCC,
    )


def _diagonal_plus_low_rank_chunks(
    q_MBHCK, k_MBHCK, v_MBHCV, a_MBHCK, b_MBHCK, log_decay_MBHCK, *, compensate
) -> Chunks:
    """Returns `Chunks` with A_ij = -b_i^T diag(D_{i-1,j}) a_j and Z_ij = q_i^T diag(D_ij) a_j.

    k and v do not depend on the state: they stand in write_CV, local_CV and local_KV.
    """
    H = v_MBHCV.shape[2]
    sums = _decay_sums(log_decay_MBHCK)
    products = _decayed_products(sums, H)
    products_exclusive = _decayed_products(sums, H, exclusive=True)
    return Chunks(
        A_CC=-products_exclusive(b_MBHCK, a_MBHCK),
        read_CK=_decayed(b_MBHCK, sums.g_exclusive_CK),
        write_CV=jnp.einsum("MBHij,MBHjV->MBHiV", products_exclusive(b_MBHCK, k_MBHCK), v_MBHCV),
        q_CK=_decayed(q_MBHCK, sums.g_cumsum_CK),
        Z_CC=products(q_MBHCK, a_MBHCK),
        w_CK=_decayed(a_MBHCK, sums.g_reversed_CK),
        exp_g_total_K1=_exp_g_total(sums),
        A_rest_CC=-_A_rest(b_MBHCK, a_MBHCK, sums, exclusive=True) if compensate else None,
        local_CV=jnp.einsum("MBHij,MBHjV->MBHiV", products(q_MBHCK, k_MBHCK), v_MBHCV),
        local_KV=jnp.einsum("MBHCK,MBHCV->MBHKV", _decayed(k_MBHCK, sums.g_reversed_CK), v_MBHCV),
    )


def _decay_sums(log_decay_MBHCK):
    """Returns the `decay.Sums` of each chunk's log decay, whose fields are None without a decay."""
    decay_kind = decay.kind(log_decay_MBHCK)
    if decay_kind == "none":
        return cast(decay.Sums, decay.Sums._make([None] * len(decay.Sums._fields)))
    return decay.chunk_sums(log_decay_MBHCK, levels=decay_kind == "per_channel")


def _decayed(x_MBHCK, g_MBHCK):
    return x_MBHCK if g_MBHCK is None else scaled(x_MBHCK, jnp.exp(g_MBHCK))


def _exp_g_total(sums):
    return None if sums.g_total_K is None else jnp.exp(sums.g_total_K)[..., None]


def _decayed_products(sums, H, *, exclusive=False):
    """Returns a function (x, y) -> x_i^T diag(D_ij) y_j of a chunk's tokens, zero for j > i.

    With `exclusive` it is x_i^T diag(D_{i-1,j}) y_j, and the diagonal is zero. Where all channels
    decay alike, heads that share x and y share their products x_i^T y_j.
    """
    if decay.kind(sums.log_decay_CK) == "per_channel":

        def per_channel(x_MBGCK, y_MBGCK):
            x_MBHCK, y_MBHCK = (arguments.repeat_heads(z, H) for z in (x_MBGCK, y_MBGCK))
            return decay.decayed_scores(x_MBHCK, y_MBHCK, sums, exclusive=exclusive)

        return per_channel
    D_MBHCC = _pair_decay(sums, exclusive)

    def per_head(x_MBGCK, y_MBGCK):
        products_MBGCC = jnp.einsum("MBGiK,MBGjK->MBGij", x_MBGCK, y_MBGCK)
        products_MBHCC = arguments.repeat_heads(products_MBGCC, H)
        if D_MBHCC is None:
            return jnp.tril(products_MBHCC, -1 if exclusive else 0)
        return products_MBHCC * D_MBHCC

    return per_head


def _pair_decay(sums, exclusive):
    if sums.log_decay_CK is None:
        return None
    return decay.pair_decay(sums.log_decay_CK, exclusive=exclusive)


def _A_rest(x_MBHCK, y_MBHCK, sums, *, exclusive):
    """Returns what to add to A's rounded products x_i^T diag(D_ij) y_j, without gradient."""
    x_MBHCK, y_MBHCK, sums = jax.lax.stop_gradient((x_MBHCK, y_MBHCK, sums))
    decay_kind = decay.kind(sums.log_decay_CK)
    if decay_kind == "per_channel":
        rest_MBHCC = decay.decayed_scores(
            x_MBHCK, y_MBHCK, sums, exclusive=exclusive, rectangle=compensated.rectangle_rest
        )
    else:
        rest_MBHCC = compensated.product_rest(x_MBHCK, y_MBHCK)
    if decay_kind == "per_token":
        products_MBHCC = jnp.einsum("MBHiK,MBHjK->MBHij", x_MBHCK, y_MBHCK)
        between_MBHCC = decay.sums_between(sums.log_decay_CK[..., 0], exclusive)
        D_MBHCC = _pair_decay(sums, exclusive)
        rest_MBHCC = compensated.decayed_rest(products_MBHCC, rest_MBHCC, D_MBHCC, between_MBHCC)
    return jnp.tril(rest_MBHCC, -1)


def _pass(chunks: Chunks, S_BHKV):
    """Returns a block's outputs, the state that leaves it, and the state that enters each chunk."""
    state_dot = compensated.state_product(chunks.A_rest_CC)

    def one_chunk(S_BHKV, inputs):
        c, X_BHCC = inputs
        # R = write + read S, U = (I + A)^-1 R
        R_BHCV = c.write_CV + state_dot("BHCK,BHKV->BHCV", c.read_CK, S_BHKV)
        U_BHCV = compensated.solve(c.A_CC, c.A_rest_CC, X_BHCC, R_BHCV)
        # S' = exp(g_total) S + w^T U + local
        decayed_BHKV = S_BHKV if c.exp_g_total_K1 is None else c.exp_g_total_K1 * S_BHKV
        S_next = decayed_BHKV + state_dot("BHCK,BHCV->BHKV", c.w_CK, U_BHCV)
        if c.local_KV is not None:
            S_next = S_next + c.local_KV
        return S_next, (S_BHKV, U_BHCV)

    X_MBHCC = triangular_inverse.inverse(chunks.A_CC)
    S_BHKV, (S_MBHKV, U_MBHCV) = jax.lax.scan(one_chunk, S_BHKV, (chunks, X_MBHCC))
    # o = (q exp(g_cumsum)) S + Z U + local
    o_MBHCV = jnp.einsum("MBHCK,MBHKV->MBHCV", chunks.q_CK, S_MBHKV)
    o_MBHCV = o_MBHCV + jnp.einsum("MBHij,MBHjV->MBHiV", chunks.Z_CC, U_MBHCV)
    if chunks.local_CV is not None:
        o_MBHCV = o_MBHCV + chunks.local_CV
    return o_MBHCV, S_BHKV, S_MBHKV


def _pass_backward(c: Chunks, S_MBHKV, do_MBHCV, dS_BHKV):
    """Returns the cotangents of a block's `Chunks`, and of the state that enters the block."""
    state_dot = compensated.state_product(c.A_rest_CC)
    # R and U again, of all chunks at once, from the entering states
    X_MBHCC = triangular_inverse.inverse(c.A_CC)
    R_MBHCV = c.write_CV + state_dot("MBHCK,MBHKV->MBHCV", c.read_CK, S_MBHKV)
    U_MBHCV = compensated.solve(c.A_CC, c.A_rest_CC, X_MBHCC, R_MBHCV)
    # The outputs' part of dU = Z^T do + w dS', and of dS
    dU_MBHCV = jnp.einsum("MBHij,MBHiV->MBHjV", c.Z_CC, do_MBHCV)
    dS_MBHKV = jnp.einsum("MBHCK,MBHCV->MBHKV", c.q_CK, do_MBHCV)

    def one_chunk(dS_next, inputs):
        c, X_BHCC, dU_BHCV, dS_BHKV = inputs
        # dR = (I + A)^-T dU
        dU_BHCV = dU_BHCV + state_dot("BHCK,BHKV->BHCV", c.w_CK, dS_next)
        dR_BHCV = compensated.solve_transposed(c.A_CC, c.A_rest_CC, X_BHCC, dU_BHCV)
        # dS = exp(g_total) dS' + read^T dR + (q exp(g_cumsum))^T do
        decayed_BHKV = dS_next if c.exp_g_total_K1 is None else c.exp_g_total_K1 * dS_next
        dS_BHKV = dS_BHKV + decayed_BHKV + state_dot("BHCK,BHCV->BHKV", c.read_CK, dR_BHCV)
        return dS_BHKV, (dS_next, dR_BHCV)

    dS_BHKV, (dS_next_MBHKV, dR_MBHCV) = jax.lax.scan(
        one_chunk, dS_BHKV, (c, X_MBHCC, dU_MBHCV, dS_MBHKV), reverse=True
    )
    # dexp(g_total) = sum_V dS' S, summed over the axes that share a decay
    dexp_g_total_MBHK1 = None
    if c.exp_g_total_K1 is not None:
        shared = [axis for axis in (2, 3) if c.exp_g_total_K1.shape[axis] == 1]
        dexp_g_total_MBHK1 = matmul.sum_last(dS_next_MBHKV * S_MBHKV)
        dexp_g_total_MBHK1 = jnp.sum(dexp_g_total_MBHK1, axis=shared, keepdims=True)
    # dA = -dR U^T, dZ = do U^T, and the products with a state
    dchunks = Chunks(
        A_CC=-compensated.precise("MBHiV,MBHjV->MBHij", dR_MBHCV, U_MBHCV),
        read_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", dR_MBHCV, S_MBHKV),
        write_CV=dR_MBHCV,
        q_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", do_MBHCV, S_MBHKV),
        Z_CC=jnp.einsum("MBHiV,MBHjV->MBHij", do_MBHCV, U_MBHCV),
        w_CK=jnp.einsum("MBHCV,MBHKV->MBHCK", U_MBHCV, dS_next_MBHKV),
        exp_g_total_K1=dexp_g_total_MBHK1,
        A_rest_CC=None if c.A_rest_CC is None else jnp.zeros_like(c.A_rest_CC),
        local_CV=None if c.local_CV is None else do_MBHCV,
        local_KV=None if c.local_KV is None else dS_next_MBHKV,
    )
    return dchunks, dS_BHKV


@custom_vjp(0)
def _run(form: _Form, inputs, S_BHKV, compensate):
    """Computes all blocks of chunks in turn; returns (o_BTHV, the final state).

    inputs: arrays (B, T, heads, dim), q first, v third. compensate: a traced flag, or None for no.
    """
    return _run_forward(form, inputs, S_BHKV, compensate)[0]


def _run_forward(form, inputs, S_BHKV, compensate):
    T, dtype = inputs[2].shape[1], inputs[2].dtype
    L = form.C * form.M
    padded = _padded(inputs, L)

    def over_blocks(compensate, padded, S_BHKV):
        def block(S_BHKV, _, inputs):
            chunks = form.chunks(*_chunks(inputs, form, S_BHKV.dtype), compensate=compensate)
            o_MBHCV, S_BHKV, S_MBHKV = _pass(chunks, S_BHKV)
            return chunk_blocks.from_chunks(o_MBHCV.astype(dtype)), S_BHKV, S_MBHKV

        return chunk_blocks.scan(block, S_BHKV, padded, padded[2], L)

    o_BTHV, S_BHKV, S_NMBHKV = branches.either(compensate, over_blocks, padded, S_BHKV)
    o_BTHV, S_NMBHKV = remat.named((o_BTHV[:, :T], S_NMBHKV))
    return (o_BTHV, S_BHKV), (inputs, S_NMBHKV, compensate)


def _run_backward(form, residuals, cotangents):
    inputs, S_NMBHKV, compensate = residuals
    do_BTHV, dS_BHKV = cotangents
    T, wide = do_BTHV.shape[1], dS_BHKV.dtype
    L = form.C * form.M
    padded = _padded((inputs, do_BTHV), L)

    def over_blocks(compensate, padded, S_NMBHKV, dS_BHKV):
        def block(dS_BHKV, S_MBHKV, cut):
            inputs, do_BLHV = cut
            chunks, maps_vjp = jax.vjp(
                lambda *x: form.chunks(*_chunks(x, form, wide), compensate=compensate), *inputs
            )
            do_MBHCV = chunk_blocks.to_chunks(do_BLHV, form.C, wide)
            dchunks, dS_BHKV = _pass_backward(chunks, S_MBHKV, do_MBHCV, dS_BHKV)
            return maps_vjp(dchunks), dS_BHKV, None

        return chunk_blocks.scan(
            block, dS_BHKV, padded, padded[0], L, per_block=S_NMBHKV, reverse=True
        )

    dinputs, dS_BHKV, _ = branches.either(compensate, over_blocks, padded, S_NMBHKV, dS_BHKV)
    return jax.tree.map(lambda dx: dx[:, :T], dinputs), dS_BHKV, None


_run.defvjp(_run_forward, _run_backward)


def _padded(arrays, L):
    """Pads arrays (B, T, H, K) to a multiple of L tokens by zeros: they neither decay nor write."""
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, chunk_blocks.padding(x.shape[1], L)), (0, 0), (0, 0))),
        arrays,
    )


def _chunks(inputs, form, dtype):
    """Cuts a block's inputs into chunks of C tokens, in `dtype`, and scales the first input, q.

    `dtype` is float32 or wider: U is a long alternating sum where beta is near 2, and with bfloat16
    operands it keeps one digit.
    """
    to_chunks = functools.partial(chunk_blocks.to_chunks, C=form.C, dtype=dtype)
    q_MBGCK, *others = jax.tree.map(to_chunks, inputs)
    return q_MBGCK * form.scale, *others
