"""The diagonal recurrence in two levels, with its own backward pass (docs/math/diagonal_scan.md).

Time is cut into N chunks of C tokens. A run of tokens is the affine map h -> A h + b, and maps
compose: (A2, b2) after (A1, b1) is (A2 A1, A2 b1 + b2).

  1. The map of every chunk, all chunks at once: C steps over arrays (B, N, D) that stay in cache.
  2. The state that enters each chunk: N steps of one state each, so that two chunks' decays are
     never multiplied.
  3. Every state: again C steps over all chunks at once, each from its entering state, in place.

Two things are decided as the program runs, by the maps of step 1 (`branches`):

  - Where the decays of a chunk grow beyond 2^32 together, a map's product may be infinite, or its
    rounding larger than what it acts on, though every state is small. Then the recurrence runs
    token by token.
  - Where a chunk keeps more than 7/8, the rounding of A, up to 128 times that of one product, adds
    up over some 1 / (1 - |A|) chunks. Then step 2 is repeated on what it missed: the difference
    between the state that a chunk leaves, token by token from the one that enters, and the one that
    its map gave.

Otherwise x and the decay are read twice and h is written once; `associative_scan`, over all tokens
or inside each chunk, makes about 2 log2(T) arrays and takes longer (docs/results.md).

The backward pass is the same scan run the other way, with the decays moved by one; its residuals
are a and h. A document's start is selected, not multiplied: its decay is 0, but the state before
it may not be finite.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import branches, chunk_blocks, remat
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.ops.diagonal_scan import reference

CHUNK_SIZE = 128
GROWING = 2.0**32
LASTING = 7 / 8


def run(x_BTD, decay_BTD, initial_state_BD, start_BT1=None, reverse=False):
    """Computes h_t = decay_t * h_{t-1} + x_t in two levels of scans; returns (h, final state)."""
    dtype = decay_BTD.dtype
    h_BTD, final_BD = _scan(reverse, x_BTD.astype(dtype), decay_BTD, initial_state_BD, start_BT1)
    return h_BTD.astype(reference.output_dtype(x_BTD.dtype, dtype)), final_BD


def _two_level(reverse, x_BTD, decay_BTD, initial_state_BD, start_BT1):
    T = x_BTD.shape[1]
    C = min(CHUNK_SIZE, T) if chunk_blocks.known(T) else CHUNK_SIZE
    missing = chunk_blocks.padding(T, C)

    def in_chunks(z_BTD, fill):
        """Cuts (B, T, D) into chunks (B, N, C, D); padding by `fill` leaves the state as it is."""
        if z_BTD is None:
            return None
        if missing != 0:
            z_BTD = jnp.pad(z_BTD, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
        return z_BTD.reshape(z_BTD.shape[0], -1, C, z_BTD.shape[2])

    x_BNCD: Any
    x_BNCD, decay_BNCD = in_chunks(x_BTD, 0), in_chunks(decay_BTD, 1)
    start_BNC1 = in_chunks(start_BT1, False)

    def at(z, i, axis=2):
        return lax.dynamic_index_in_dim(z, i, axis, keepdims=False)

    def next_state(h_BND, i):
        a_BND, x_BND = at(decay_BNCD, i), at(x_BNCD, i)
        start_BN1 = None if start_BNC1 is None else at(start_BNC1, i)
        return reference.unless(start_BN1, a_BND * h_BND) + x_BND

    def extend_map(carry, i):
        A_BND, b_BND, growth_BND = carry
        a_BND = at(decay_BNCD, i)
        growth_BND = growth_BND * jnp.maximum(_squared(a_BND), 1)
        return (a_BND * A_BND, next_state(b_BND, i), growth_BND), None

    def extend_states(carry, i):
        h_BND, h_BNCD = carry
        h_BND = next_state(h_BND, i)
        return (h_BND, lax.dynamic_update_index_in_dim(h_BNCD, h_BND, i, 2)), None

    # 1. The map A h + b of every chunk, and how far its decays grow
    order_C = jnp.arange(C)
    if reverse:
        order_C = order_C[::-1]
    zero_BND = jnp.zeros_like(x_BNCD[:, :, 0])
    one_BND = jnp.ones_like(zero_BND)
    (A_BND, b_BND, growth_BND), _ = lax.scan(
        extend_map, (one_BND, zero_BND, jnp.real(one_BND)), order_C
    )
    cut_BN1 = None if start_BNC1 is None else jnp.any(start_BNC1, axis=2)

    # 2. The state that enters each chunk, in one of three ways
    def by_maps(b_BND, state_BD):
        """Returns the states before and after each chunk, from the chunks' maps h -> A h + b."""

        def one_chunk(state_BD, chunk):
            A_BD, b_BD, cut_B1 = chunk
            next_BD = reference.unless(cut_B1, A_BD * state_BD) + b_BD
            return next_BD, (state_BD, next_BD)

        maps = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (A_BND, b_BND, cut_BN1))
        _, states = lax.scan(one_chunk, state_BD, maps, reverse=reverse)
        return jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1), states)

    def corrected(b_BND, state_BD):
        """Returns the states that enter chunks; a second pass adds what rounding of A lost."""
        entering_BND, leaving_BND = by_maps(b_BND, state_BD)
        exact_BND, _ = lax.scan(lambda h, i: (next_state(h, i), None), entering_BND, order_C)
        missed_BND, _ = by_maps(exact_BND - leaving_BND, jnp.zeros_like(state_BD))
        return entering_BND + missed_BND

    def token_by_token(b_BND, state_BD):
        del b_BND

        def one_chunk(state_BD, n):
            chunk = jax.tree.map(lambda z: at(z, n, 1), (x_BNCD, decay_BNCD, start_BNC1))

            def one_token(state_BD, i):
                x_BD, a_BD, start_B1 = jax.tree.map(lambda z: at(z, i, 1), chunk)
                return reference.unless(start_B1, a_BD * state_BD) + x_BD, None

            return lax.scan(one_token, state_BD, order_C)[0], state_BD

        chunks_N = jnp.arange(x_BNCD.shape[1])
        return jnp.moveaxis(lax.scan(one_chunk, state_BD, chunks_N, reverse=reverse)[1], 0, 1)

    lasts = branches.anywhere(_squared(A_BND) > LASTING**2)
    grows = branches.anywhere(growth_BND > GROWING**2)
    ways = lambda *maps: by_maps(*maps)[0], corrected, token_by_token
    entering_BND = lax.switch(
        jnp.where(grows, 2, lasts.astype(jnp.int32)), ways, b_BND, initial_state_BD
    )
    # 3. Every state, from the one that enters its chunk
    (_, h_BNCD), _ = lax.scan(extend_states, (entering_BND, jnp.zeros_like(x_BNCD)), order_C)
    h_BTD = h_BNCD.reshape(h_BNCD.shape[0], -1, h_BNCD.shape[3])[:, :T]
    return h_BTD, h_BTD[:, 0 if reverse else -1]


def _squared(z):
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2 if jnp.iscomplexobj(z) else z**2


@custom_vjp(0)
def _scan(reverse, x_BTD, decay_BTD, initial_state_BD, start_BT1):
    return _two_level(reverse, x_BTD, decay_BTD, initial_state_BD, start_BT1)


def _forward(reverse, x_BTD, decay_BTD, initial_state_BD, start_BT1):
    h_BTD, final_BD = remat.named(_scan(reverse, x_BTD, decay_BTD, initial_state_BD, start_BT1))
    return (h_BTD, final_BD), (decay_BTD, h_BTD, initial_state_BD, start_BT1)


def _backward(reverse, saved, gradients):
    decay_BTD, h_BTD, initial_state_BD, start_BT1 = saved
    g_BTD, g_final_BD = gradients

    def neighbour(z_BTD, edge_B1D, later):
        """Returns each token's next (`later`) or previous value in the scan; edge_B1D fills in."""
        if later == reverse:
            return jnp.concatenate([edge_B1D, z_BTD[:, :-1]], axis=1)
        return jnp.concatenate([z_BTD[:, 1:], edge_B1D], axis=1)

    # l_t = g_t + a_{t+1} l_{t+1}, from the final state's cotangent on
    next_decay_BTD = neighbour(decay_BTD, jnp.ones_like(decay_BTD[:, :1]), later=True)
    next_start_BT1 = None
    if start_BT1 is not None:
        next_start_BT1 = neighbour(start_BT1, jnp.zeros_like(start_BT1[:, :1]), later=True)
    previous_h_BTD = neighbour(h_BTD, initial_state_BD[:, None], later=False)
    dx_BTD, _ = _scan(not reverse, g_BTD, next_decay_BTD, g_final_BD, next_start_BT1)
    # dx_t = l_t, da_t = l_t h_{t-1}, dh_0 = a_1 l_1
    first = -1 if reverse else 0
    return dx_BTD, dx_BTD * previous_h_BTD, decay_BTD[:, first] * dx_BTD[:, first], None


_scan.defvjp(_forward, _backward)
