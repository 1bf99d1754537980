"""The diagonal recurrence in two levels, with its own backward pass.

Time is cut into N chunks of C tokens. A run of tokens is the affine map h -> A h + b, and maps compose:
(A2, b2) after (A1, b1) is (A2 A1, A2 b1 + b2).

  1. Every chunk's map, all chunks at once: C steps over arrays (B, N, D) that stay in cache.
  2. The state that enters each chunk: `jax.lax.associative_scan` over the N maps.
  3. Every state: again C steps over all chunks at once, each from its entering state, written in place.

x and the decay are read twice and h is written once. `associative_scan` over all tokens instead makes about
2 log2(T) arrays whose sizes add up to several times that, slice by strided slice; so does one inside each chunk.
On two CPU cores this form was 2 to 10 times faster than either (float32, B * D 64 to 2048, T 1024 to 16384), and C between
64 and 256 made no difference beyond the noise: 128.

Backward. With the incoming gradient g_t (that of the final state is added by letting it enter the scan):

    l_t = g_t + a_{t+1} l_{t+1}      dx_t = l_t      da_t = l_t h_{t-1}      dh_0 = a_1 l_1

which is the same scan run the other way with the decays moved by one. Only a and h are kept. Nothing is conjugated:
JAX's cotangents are those of the transpose (the gradient of a real loss is the conjugate of the steepest ascent).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import spans
from kernels_pallas.diagonal_scan import reference
from kernels_pallas.kept import kept

CHUNK_SIZE = 128


def _compose(first, second):
    return second[0] * first[0], second[0] * first[1] + second[1]


def _compose_all(map_BND, reverse):
    """What the maps up to each one compose to. Of a symbolic number of them, one after the other."""
    if spans.known(map_BND[0].shape[1]):
        return lax.associative_scan(_compose, map_BND, reverse=reverse, axis=1)

    def step(before_BD, map_BD):
        through_BD = _compose(before_BD, map_BD)
        return through_BD, through_BD

    map_NBD = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), map_BND)
    nothing_BD = (jnp.ones_like(map_BND[0][:, 0]), jnp.zeros_like(map_BND[1][:, 0]))
    _, through_NBD = lax.scan(step, nothing_BD, map_NBD, reverse=reverse)
    return jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1), through_NBD)


def _two_level(x_BTD, decay_BTD, initial_state_BD, reverse):
    B, T, D = x_BTD.shape
    C = min(CHUNK_SIZE, T) if spans.known(T) else CHUNK_SIZE
    missing = spans.missing(T, C)
    if missing != 0:  # x = 0 and decay = 1 leave the state as it is, from whichever end it comes
        padding = ((0, 0), (0, missing), (0, 0))
        x_BTD = jnp.pad(x_BTD, padding)
        decay_BTD = jnp.pad(decay_BTD, padding, constant_values=1)
    x_BNCD, decay_BNCD = (z.reshape(B, -1, C, D) for z in (x_BTD, decay_BTD))

    def token(z_BNCD, i):
        return lax.dynamic_index_in_dim(z_BNCD, i, 2, keepdims=False)

    def extend_map(map_BND, i):
        return _compose(map_BND, (token(decay_BNCD, i), token(x_BNCD, i))), None

    def extend_states(carry, i):
        h_BND, h_BNCD = carry
        h_BND = token(decay_BNCD, i) * h_BND + token(x_BNCD, i)
        return (h_BND, lax.dynamic_update_index_in_dim(h_BNCD, h_BND, i, 2)), None

    order_C = jnp.arange(C)
    if reverse:
        order_C = order_C[::-1]
    nothing_BND = (jnp.ones_like(x_BNCD[:, :, 0]), jnp.zeros_like(x_BNCD[:, :, 0]))
    map_BND, _ = lax.scan(extend_map, nothing_BND, order_C)
    total_BND, local_BND = _compose_all(map_BND, reverse)
    after_BND = total_BND * initial_state_BD[:, None] + local_BND
    if reverse:
        entering_BND = jnp.concatenate([after_BND[:, 1:], initial_state_BD[:, None]], axis=1)
    else:
        entering_BND = jnp.concatenate([initial_state_BD[:, None], after_BND[:, :-1]], axis=1)
    (_, h_BNCD), _ = lax.scan(extend_states, (entering_BND, jnp.zeros_like(x_BNCD)), order_C)
    h_BTD = h_BNCD.reshape(B, -1, D)[:, :T]
    return h_BTD, h_BTD[:, 0 if reverse else -1]


def chunked(x_BTD, decay_BTD, initial_state_BD, reverse=False):
    """h_t = decay_t * h_{t-1} + x_t. Arguments are normalised by `api.py`."""
    dtype = decay_BTD.dtype
    h_BTD, final_BD = _scan(x_BTD.astype(dtype), decay_BTD, initial_state_BD, reverse)
    return h_BTD.astype(reference.output_dtype(x_BTD.dtype, dtype)), final_BD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(x_BTD, decay_BTD, initial_state_BD, reverse):
    return _two_level(x_BTD, decay_BTD, initial_state_BD, reverse)


def _forward(x_BTD, decay_BTD, initial_state_BD, reverse):
    h_BTD, final_BD = kept(_two_level(x_BTD, decay_BTD, initial_state_BD, reverse))
    return (h_BTD, final_BD), (decay_BTD, h_BTD, initial_state_BD)


def _backward(reverse, saved, gradients):
    decay_BTD, h_BTD, initial_state_BD = saved
    g_BTD, g_final_BD = gradients
    one_B1D, initial_B1D = jnp.ones_like(decay_BTD[:, :1]), initial_state_BD[:, None]
    if reverse:
        next_decay_BTD = jnp.concatenate([one_B1D, decay_BTD[:, :-1]], axis=1)
        previous_h_BTD = jnp.concatenate([h_BTD[:, 1:], initial_B1D], axis=1)
    else:
        next_decay_BTD = jnp.concatenate([decay_BTD[:, 1:], one_B1D], axis=1)
        previous_h_BTD = jnp.concatenate([initial_B1D, h_BTD[:, :-1]], axis=1)
    dx_BTD, _ = _two_level(g_BTD, next_decay_BTD, g_final_BD, not reverse)
    first = -1 if reverse else 0
    return dx_BTD, dx_BTD * previous_h_BTD, decay_BTD[:, first] * dx_BTD[:, first]


_scan.defvjp(_forward, _backward)
