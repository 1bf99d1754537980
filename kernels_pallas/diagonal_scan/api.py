"""The elementwise recurrence, real or complex: the public function."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, segments
from kernels_pallas import recurrence_arguments as arguments
from kernels_pallas.diagonal_scan import reference

IMPLEMENTATIONS = (dispatch.Implementation("reference", reference.recurrent),)


def diagonal_scan(
    x_BTD: jax.Array,
    decay_BTD: jax.Array | None = None,
    *,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t * h_{t-1} + x_t, with a = decay_BTD (any value, complex too) or exp(log_decay)."""
    if (decay_BTD is None) == (log_decay is None):
        raise ValueError("diagonal_scan: give exactly one of decay_BTD and log_decay")
    decay_BTD = jnp.exp(log_decay) if decay_BTD is None else decay_BTD
    dtype = jnp.promote_types(jnp.promote_types(x_BTD.dtype, decay_BTD.dtype), jnp.float32)
    decay_BTD = jnp.broadcast_to(decay_BTD.astype(dtype), x_BTD.shape)
    if segment_ids is not None:
        if reverse:
            segment_ids = segment_ids[:, ::-1]
        start_BT = segments.starts(segment_ids)
        start_BT = start_BT[:, ::-1] if reverse else start_BT
        decay_BTD = jnp.where(start_BT[..., None], 0.0, decay_BTD)
    if initial_state is None:
        initial_state = jnp.zeros((x_BTD.shape[0], x_BTD.shape[2]), dtype)
    arguments.check_shape(
        "diagonal_scan", "initial_state", initial_state, (x_BTD.shape[0], x_BTD.shape[2])
    )
    chosen = dispatch.choose("diagonal_scan", IMPLEMENTATIONS, implementation)
    return chosen.call(x_BTD.astype(dtype), decay_BTD, initial_state.astype(dtype), reverse=reverse)
