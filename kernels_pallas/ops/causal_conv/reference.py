"""The short causal convolution by its definition, token by token; its state is the last inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import arguments, chunk_blocks, dtypes, matmul, segments


class Finish(NamedTuple):
    """What follows the convolution: an activation, then an L2 norm per head; each may be None.

    heads: the number of heads that the D channels make. eps: added to a head's sum of squares.
    """

    activation: str | None = None
    heads: int | None = None
    eps: float = 1e-6

    def __call__(self, z):
        """Applies the activation and the norm to the sums z (..., D), in z's dtype."""
        if self.activation == "silu":
            z = jax.nn.silu(z)
        if self.heads is not None:
            parts = z.reshape(*z.shape[:-1], self.heads, -1)
            square = matmul.sum_last(jnp.square(parts))
            z = matmul.scaled(parts, jax.lax.rsqrt(square + self.eps)).reshape(z.shape)
        return z


def finish_of(x, activation, heads, eps) -> Finish:
    """Returns the `Finish` for inputs x (..., D); raises ValueError for options that do not fit."""
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: activation is {activation!r}; expected None or 'silu'")
    if not arguments.is_number(eps) or eps < 0:
        raise ValueError(f"causal_conv: eps is {eps!r:.60}; expected a number of at least 0")
    if heads is not None and (not arguments.is_count(heads) or heads < 1 or x.shape[-1] % heads):
        raise ValueError(
            f"causal_conv: l2_norm_heads is {heads!r:.60}; it must divide x's D = {x.shape[-1]}"
        )
    if heads is not None and jnp.iscomplexobj(x):
        raise ValueError(f"causal_conv: l2_norm_heads needs a real x; got {x.dtype}")
    return Finish(activation, heads, eps)


def promoted(x, *others):
    """Returns x, cast to a complex dtype if one of `others` (arrays or None) is complex."""
    others = [z for z in others if z is not None]
    if jnp.iscomplexobj(x) or not any(jnp.iscomplexobj(z) for z in others):
        return x
    return x.astype(dtypes.common(x.dtype, *(z.dtype for z in others)))


def demoted(z, dtype):
    """Returns z in `dtype`, or its real part if `dtype` is real: the transpose of `promoted`."""
    return (z if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.real(z)).astype(dtype)


def step(x_BD, w, tail, *, bias=None, activation=None, l2_norm_heads=None, eps=1e-6):
    """One token of `causal_conv`, for decoding: z = bias + w[-1] x + sum_{i<I-1} w[i] tail[i].

    Args:
      x_BD: the token's input.
      w: (I, D), whose last row w[-1] is multiplied with this token.
      tail: (B, I-1, D), the inputs before it, oldest first, as `causal_conv` or an earlier step
        returned it.
      bias: (D,) or None.
      activation, l2_norm_heads, eps: applied to z, as in `causal_conv`.

    Returns:
      (y_BD, the new tail), in the dtypes that `causal_conv` gives; sums are float32 or wider.
    """
    for name, array in (("x", x_BD), ("w", w), ("tail", tail)):
        arguments.check_array("causal_conv.step", name, array)
    tail_dtype = promoted(x_BD, tail).dtype
    x_BD = promoted(x_BD, w, bias, tail)
    finish = finish_of(x_BD, activation, l2_norm_heads, eps)
    y_BD, tail = _step(x_BD, w, tail, bias, finish)
    return y_BD.astype(x_BD.dtype), demoted(tail, tail_dtype)


def _step(x_BD, w, tail, bias, finish):
    dtype = dtypes.common(x_BD.dtype, w.dtype, jnp.float32)
    seen_BID = jnp.concatenate([tail.astype(x_BD.dtype), x_BD[:, None]], axis=1)
    z_BD = jnp.sum(seen_BID.astype(dtype) * w.astype(dtype)[None], axis=1)
    if bias is not None:
        z_BD = z_BD + bias.astype(dtype)[None]
    return finish(z_BD), seen_BID[:, 1:]


def recurrent(x_BTD, w, bias, initial_state, start_BT, finish):
    """Computes the convolution token by token; returns (y_BTD, the last I-1 inputs).

    start_BT: True where a document starts and earlier inputs count as 0, or None. finish: the
      `Finish` of each token's sum. `api.py` normalises the arguments.
    """

    def scan_step(tail, token):
        x_BD, start_B = token
        if start_B is not None:
            tail = jnp.where(start_B[:, None, None], 0, tail)
        y_BD, tail = _step(x_BD, w, tail, bias, finish)
        return tail, y_BD

    time_first = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x_BTD, start_BT))
    tail, y_TBD = jax.lax.scan(scan_step, initial_state, time_first)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x_BTD.dtype), tail


def tail(x_BTD, initial_state, start_BT):
    """Returns the state after x: the last I-1 inputs of the last token's document, zeros before."""
    n, T = initial_state.shape[1], x_BTD.shape[1]
    last = max(T - n, 0) if chunk_blocks.known(T) else 0
    seen_BSD = jnp.concatenate([initial_state, x_BTD[:, last:]], axis=1)
    if start_BT is not None:
        # the initial state belongs to the first token's document, 0
        run_BS = jnp.pad(segments.count_starts(start_BT[:, last:]), ((0, 0), (n, 0)))
        seen_BSD = jnp.where((run_BS == run_BS[:, -1:])[..., None], seen_BSD, 0)
    return seen_BSD[:, seen_BSD.shape[1] - n :]
