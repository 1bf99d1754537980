"""The diagonal recurrence by its definition: one token at a time."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments


def step(x_BD, decay_BD, state_BD):
    """One token of `diagonal_scan`: h = decay * state + x, for decoding.

    Args:
      x_BD: the token's input.
      decay_BD: its decay, real or complex, (B, D) or (D,); `jnp.exp(log_decay)` where that is what
        is at hand.
      state_BD: what `diagonal_scan` returned as the final state, or an earlier step did; float32 or
        wider.

    Returns:
      (h_BD in the dtype that `diagonal_scan` gives, the new state in the state's dtype).
    """
    for name, array in (("x", x_BD), ("decay", decay_BD), ("state", state_BD)):
        arguments.check_array("diagonal_scan.step", name, array)
    decay_BD = decay_BD if decay_BD.ndim == 2 else decay_BD[None]
    state_BD = decay_BD.astype(state_BD.dtype) * state_BD + x_BD.astype(state_BD.dtype)
    return state_BD.astype(output_dtype(x_BD.dtype, state_BD.dtype)), state_BD


def output_dtype(x_dtype, state_dtype):
    """That of x, except that a complex state of a real x is given out complex."""
    promoted = jnp.issubdtype(state_dtype, jnp.complexfloating) and not jnp.issubdtype(
        x_dtype, jnp.complexfloating
    )
    return state_dtype if promoted else x_dtype


def unless(start, kept):
    """What is kept of a state, and nothing where a document starts: a product with 0 would let pass
    what is not finite."""
    return kept if start is None else jnp.where(start, 0, kept)


def recurrent(x_BTD, decay_BTD, initial_state_BD, start_BT1=None, reverse=False):
    """h_t = decay_t * h_{t-1} + x_t as one `lax.scan`. Arguments are normalised by `api.py`."""

    def scan_step(state_BD, inputs):
        x_BD, decay_BD, start_B1 = inputs
        state_BD = unless(start_B1, decay_BD * state_BD) + x_BD
        return state_BD, state_BD

    # In the state's dtype: XLA's CPU backend (jaxlib 0.10.2) converts a whole narrower buffer at
    # each of its tokens.
    inputs = x_BTD.astype(decay_BTD.dtype), decay_BTD, start_BT1
    inputs = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), inputs)
    final_BD, h_TBD = jax.lax.scan(scan_step, initial_state_BD, inputs, reverse=reverse)
    h_BTD = jnp.moveaxis(h_TBD, 0, 1)
    return h_BTD.astype(output_dtype(x_BTD.dtype, h_BTD.dtype)), final_BD
