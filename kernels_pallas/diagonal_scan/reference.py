"""The diagonal recurrence by its definition: one token at a time."""

import jax
import jax.numpy as jnp


def step(x_BD, decay_BD, state_BD):
    """One token: h <- decay * h + x. Returns (h, h): the output is the state."""
    h_BD = decay_BD * state_BD + x_BD
    return h_BD, h_BD


def recurrent(x_BTD, decay_BTD, initial_state_BD, reverse=False):
    """h_t = decay_t * h_{t-1} + x_t as one `lax.scan`. Arguments are normalised by `api.py`."""

    def scan_step(state_BD, inputs):
        h_BD, state_BD = step(*inputs, state_BD)
        return state_BD, h_BD

    inputs = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x_BTD, decay_BTD))
    final_BD, h_TBD = jax.lax.scan(scan_step, initial_state_BD, inputs, reverse=reverse)
    return jnp.moveaxis(h_TBD, 0, 1), final_BD
