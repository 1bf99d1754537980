"""The public function of the elementwise linear recurrence h_t = a_t * h_{t-1} + x_t."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, decay, dtypes, segments
from kernels_pallas.dispatch import explicit_axes
from kernels_pallas.ops.diagonal_scan import chunked, gpu, naive_chunk, reference, tpu
from kernels_pallas.ops.diagonal_scan.case import CASE


def _by_decay(function):
    """Wraps a function so that start_BT1 is dropped: the decay is 0 where a document starts."""
    return lambda *, start_BT1, **call: function(**call)


IMPLEMENTATIONS = (
    dispatch.Implementation(
        "pallas_tpu", _by_decay(tpu.run), _by_decay(tpu.unsupported_reason), "tpu"
    ),
    dispatch.Implementation("triton", _by_decay(gpu.run), _by_decay(gpu.unsupported_reason), "gpu"),
    dispatch.Implementation("chunked", chunked.run),
    dispatch.Implementation("naive_chunk", naive_chunk.run),
    dispatch.Implementation("reference", reference.recurrent),
)


@explicit_axes.automatic(("BTD", "BD"), x_BTD="BTD")
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
    """Computes the diagonal linear recurrence, each channel on its own:

        h_t = a_t * h_{t-1} + x_t        (reverse: h_t = a_t * h_{t+1} + x_t)

    with a = decay_BTD or exp(log_decay). LRU (arXiv 2303.06349, eq. 2), RG-LRU (2402.19427, eq. 4),
    S5 and Mamba-1 (2312.00752, eq. 2a) are this with their own a and x. Any T. It runs as a chunked
    scan with its own backward pass, whose residuals are a and h alone.

    Args:
      x_BTD: (B, T, D), floating or complex.
      decay_BTD: (B, T, D), or (D,) for one decay at all times. Any value: negative, above 1,
        complex.
      log_decay: in the place of decay_BTD, of the same shapes, real or complex, real part <= 0.
        -inf forgets all that came before, and its gradient is 0. Positive values are not checked
        unless `kernels_pallas.common.checks` is on.
      initial_state: (B, D), the h before the first token (reverse: after the last); None is zero.
        It belongs to the document of the token that it meets first.
      segment_ids: integers (B, T). A document is a run of equal ids, and nothing crosses from one
        to another. This holds for NaN and Inf, too, except in kernels (where a document's start is
        a product with 0).
      reverse: run from the last token to the first.
      implementation: 'pallas_tpu', 'triton' (real), 'chunked', 'reference', or None for the best
        here.

    Returns:
      h_BTD in x's dtype (complex where the decay or the initial state makes it so), and the final
      state (B, D): h at the last token (reverse: the first) before it is rounded to that dtype.
      States are float32 or complex64 at least, whatever x is.

    Raises:
      ValueError: not exactly one of decay_BTD and log_decay, shapes that do not fit, an unknown
        implementation, or (with checks on) a positive log_decay.
      NotImplementedError: the named implementation cannot run this call.
    """
    operator = "diagonal_scan"
    if (decay_BTD is None) == (log_decay is None):
        raise ValueError(f"{operator}: give exactly one of decay_BTD and log_decay")
    arguments.check_array(operator, "x", x_BTD)
    arguments.check_flag(operator, "reverse", reverse)
    if x_BTD.ndim != 3:
        raise ValueError(f"{operator}: x must be (B, T, D); got {x_BTD.shape}")
    if not jnp.issubdtype(x_BTD.dtype, jnp.inexact):
        raise ValueError(f"{operator}: x must be floating or complex; got {x_BTD.dtype}")
    B, T, D = x_BTD.shape
    name = "decay_BTD" if log_decay is None else "log_decay"
    given: Any = decay_BTD if log_decay is None else log_decay
    arguments.check_shape(operator, name, given, (B, T, D), (D,))
    if initial_state is None:
        initial_state = jnp.zeros_like(x_BTD, shape=(B, D))
    arguments.check_shape(operator, "initial_state", initial_state, (B, D))

    dtype = dtypes.common(x_BTD.dtype, given.dtype, initial_state.dtype, jnp.float32)
    decay_BTD = decay.factors(operator, decay_BTD, log_decay, x_BTD.shape, dtype)
    start_BT1 = None
    if segment_ids is not None:
        arguments.check_segment_ids(operator, segment_ids, x_BTD)
        start_BT1 = segments.starts(segment_ids, reverse=reverse)[..., None]
        decay_BTD = jnp.where(start_BT1, 0, decay_BTD)
    if arguments.nothing(x_BTD):
        output_dtype = reference.output_dtype(x_BTD.dtype, dtype)
        return jnp.zeros_like(x_BTD, output_dtype), initial_state.astype(dtype)
    call = {
        "x_BTD": x_BTD,
        "decay_BTD": decay_BTD,
        "initial_state_BD": initial_state.astype(dtype),
        "start_BT1": start_BT1,
        "reverse": reverse,
    }
    return dispatch.run(OPERATOR, implementation, **call)


OPERATOR = dispatch.Operator(diagonal_scan, IMPLEMENTATIONS, CASE)
