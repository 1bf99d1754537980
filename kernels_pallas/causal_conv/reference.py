"""The short causal convolution by its definition: one token at a time, the tail as its state."""

import jax
import jax.numpy as jnp


def step(x_BD, w, tail, *, bias=None):
    """One token of `causal_conv`, for decoding: y = bias + w[-1] x + sum_{i<I-1} w[i] tail[i].

    Args:
      x_BD: the token's input.
      w: (I, D), w[-1] on this token.
      tail: (B, I-1, D), the inputs before it, oldest first, as `causal_conv` or an earlier step returned it.
      bias: (D,) or None.

    Returns:
      (y_BD, the new tail), both in x's dtype; sums are float32 or wider.
    """
    dtype = jnp.result_type(x_BD.dtype, w.dtype, jnp.float32)
    seen_BID = jnp.concatenate([tail.astype(x_BD.dtype), x_BD[:, None]], axis=1)
    y_BD = jnp.sum(seen_BID.astype(dtype) * w.astype(dtype)[None], axis=1)
    if bias is not None:
        y_BD = y_BD + bias.astype(dtype)[None]
    return y_BD.astype(x_BD.dtype), seen_BID[:, 1:]


def recurrent(x_BTD, w, bias, initial_state, start_BT):
    """`step` over time, the tail emptied where a document starts. Arguments are normalised by `api.py`."""

    def scan_step(tail, token):
        x_BD, start_B = token
        if start_B is not None:
            tail = jnp.where(start_B[:, None, None], 0, tail)
        y_BD, tail = step(x_BD, w, tail, bias=bias)
        return tail, y_BD

    time_first = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x_BTD, start_BT))
    tail, y_TBD = jax.lax.scan(scan_step, initial_state, time_first)
    return jnp.moveaxis(y_TBD, 0, 1), tail
