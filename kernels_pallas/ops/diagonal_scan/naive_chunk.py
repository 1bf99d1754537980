"""The chunk algebra of the diagonal scan in plain lines, to be read beside docs/math.

It computes what `chunked.py` computes, chunk after chunk and pair by pair of tokens, and leaves
the backward pass to JAX.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.ops.diagonal_scan import reference

CHUNK_SIZE = 32


def run(x_BTD, decay_BTD, initial_state_BD, start_BT1=None, reverse=False):
    """Computes h_t = decay_t * h_{t-1} + x_t from normalised arguments, C tokens at a time."""
    T, C, dtype = x_BTD.shape[1], CHUNK_SIZE, decay_BTD.dtype
    i, j, s = jnp.ogrid[: C + 1, : C + 1, : C + 1]
    up_to_1CC1, between_1CCC1 = (j <= i)[None], ((j < s) & (s <= i))[None, ..., None]
    start_BT1 = jnp.zeros_like(x_BTD[..., :1], bool) if start_BT1 is None else start_BT1

    def to_chunks(z_BTD, padding):
        z_BTD = jnp.flip(z_BTD, 1) if reverse else z_BTD
        z_BTD = jnp.pad(z_BTD, ((0, 0), (0, -T % C), (0, 0)), constant_values=padding)
        return jnp.moveaxis(z_BTD.reshape(z_BTD.shape[0], -1, C, z_BTD.shape[2]), 1, 0)

    def chunk(h_BD, inputs):
        # The entering state is x_0; what stands before token 1 decays nothing
        x_BCD, decay_BCD, start_BC1 = (jnp.pad(z, ((0, 0), (1, 0), (0, 0))) for z in inputs)
        x_BCD = x_BCD.at[:, 0].set(h_BD)
        # Pairs j <= i of one document; others are masked before they multiply: they may be NaN
        pair_BCC1 = up_to_1CC1 & ~jnp.any(between_1CCC1 & start_BC1[:, None, None], axis=3)
        # D_ij = decay_{j+1} ... decay_i, a product of those tokens' own decays
        factor_BCCC1 = between_1CCC1 & pair_BCC1[:, :, :, None]
        D_BCCD = jnp.where(factor_BCCC1, decay_BCD[:, None, None], 1).prod(axis=3)

        def weighted(x_BCD):  # sum_{j <= i} D_ij x_j
            terms_BCCD = jnp.where(pair_BCC1, D_BCCD, 0) * jnp.where(pair_BCC1, x_BCD[:, None], 0)
            return terms_BCCD.sum(axis=2)

        # h_i = sum_{j <= i} D_ij x_j
        h_BCD = weighted(x_BCD)
        # Refined once: D rounds alike in every chunk, the recurrence itself at every token anew
        before_BCD = jnp.pad(h_BCD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        missed_BCD = reference.unless(start_BC1, decay_BCD * before_BCD) + x_BCD - h_BCD
        h_BCD = (h_BCD + weighted(missed_BCD))[:, 1:]
        return h_BCD[:, -1], h_BCD

    # x = 0 and decay = 1 after the last token leave the state as it is
    chunks = to_chunks(x_BTD.astype(dtype), 0), to_chunks(decay_BTD, 1), to_chunks(start_BT1, 0)
    final_BD, h_NBCD = jax.lax.scan(jax.checkpoint(chunk), initial_state_BD, chunks)
    h_BTD = jnp.moveaxis(h_NBCD, 0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])[:, :T]
    h_BTD = h_BTD.astype(reference.output_dtype(x_BTD.dtype, dtype))
    return jnp.flip(h_BTD, 1) if reverse else h_BTD, final_BD
