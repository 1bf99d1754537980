"""The diagonal recurrence by its definition: one token at a time."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments


def step(x_BD, decay_BD, state_BD):
    """One token of `diagonal_scan`: h = decay * state + x, for decoding.

    Args:
      x_BD: the token's input.
      decay_BD: its decay, real or complex, (B, D) or (D,), or `jnp.exp` of its log decay.
      state_BD: the state that `diagonal_scan` or an earlier step returned; float32 or wider.

    Returns:
      (h_BD in the dtype that `diagonal_scan` gives, the new state in the state's dtype).
    """
    for name, array in (("x", x_BD), ("decay", decay_BD), ("state", state_BD)):
        arguments.check_array("diagonal_scan.step", name, array)
    decay_BD = decay_BD if decay_BD.ndim == 2 else decay_BD[None]
    state_BD = decay_BD.astype(state_BD.dtype) * state_BD + x_BD.astype(state_BD.dtype)
    return state_BD.astype(output_dtype(x_BD.dtype, state_BD.dtype)), state_BD


def output_dtype(x_dtype, state_dtype):
    """Returns the dtype of the scan's outputs: x's, or a complex state's where x is real."""
    promoted = jnp.issubdtype(state_dtype, jnp.complexfloating) and not jnp.issubdtype(
        x_dtype, jnp.complexfloating
    )
    return state_dtype if promoted else x_dtype


def unless(start, decayed):
    """Returns the decayed state, but 0 where a document starts: NaN times a decay of 0 is NaN."""
    return decayed if start is None else jnp.where(start, 0, decayed)


def recurrent(x_BTD, decay_BTD, initial_state_BD, start_BT1=None, reverse=False):
    """Computes h_t = decay_t * h_{t-1} + x_t token by token; returns (h_BTD, the final state).

    start_BT1: True where a document starts, in the direction of the scan, or None.
    reverse: whether h_t comes from h_{t+1}. Arguments are normalised by `api.py`.
    """

    def scan_step(state_BD, inputs):
        x_BD, decay_BD, start_B1 = inputs
        state_BD = unless(start_B1, decay_BD * state_BD) + x_BD
        return state_BD, state_BD

    # Cast before: XLA's CPU backend (jaxlib 0.10.2) converts a whole narrow buffer at each token
    inputs = x_BTD.astype(decay_BTD.dtype), decay_BTD, start_BT1
    inputs = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), inputs)
    final_BD, h_TBD = jax.lax.scan(scan_step, initial_state_BD, inputs, reverse=reverse)
    h_BTD = jnp.moveaxis(h_TBD, 0, 1)
    return h_BTD.astype(output_dtype(x_BTD.dtype, h_BTD.dtype)), final_BD
