"""Short depthwise causal convolution with state and packed documents: the public function."""

import jax
import jax.numpy as jnp

from kernels_pallas import recurrence_arguments as arguments
from kernels_pallas import segments


def causal_conv(
    x_BTD: jax.Array,
    w_ID: jax.Array,
    *,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = bias + sum_i w_i x_{t-(I-1)+i}: w[-1] multiplies the current token. Returns (y_BTD, tail (B, I-1, D))."""
    B, T, D = x_BTD.shape
    width = w_ID.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros((B, width - 1, D), x_BTD.dtype)
    arguments.check_shape("causal_conv", "initial_state", initial_state, (B, width - 1, D))
    extended = jnp.concatenate([initial_state.astype(x_BTD.dtype), x_BTD], axis=1)
    run_BT = None if segment_ids is None else segments.run_index(segment_ids)
    y_BTD = x_BTD * w_ID[-1][None, None]
    for lag in range(1, width):
        tap_BTD = extended[:, width - 1 - lag : width - 1 - lag + T]
        if run_BT is not None:
            same_BT = jnp.pad(run_BT, ((0, 0), (lag, 0)))[:, :T] == run_BT
            tap_BTD = jnp.where(same_BT[..., None], tap_BTD, 0.0)
        y_BTD = y_BTD + tap_BTD * w_ID[width - 1 - lag][None, None]
    if bias is not None:
        y_BTD = y_BTD + bias[None, None]
    return y_BTD, extended[:, T:]
