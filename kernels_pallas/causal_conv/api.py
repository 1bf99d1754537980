"""Short depthwise causal convolution with state and packed documents: the public function."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, segments
from kernels_pallas import recurrence_arguments as arguments
from kernels_pallas.causal_conv import reference, shifted

IMPLEMENTATIONS = (
    dispatch.Implementation("shifted", shifted.shifted),
    dispatch.Implementation("reference", reference.recurrent),
)


def causal_conv(
    x_BTD: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution of width I, each channel on its own:

        y_t = bias + sum_{i=0}^{I-1} w_i * x_{t-(I-1)+i}

    the short convolution before Mamba's and the delta rules' recurrences (arXiv 2312.00752, section 3.4). No
    activation. Work and memory grow with T * I: made for widths of 2 to 32 or so.

    Args:
      x_BTD: (B, T, D), floating or complex; any T, also below I-1.
      w: (I, D). w[-1] is on the current token, w[0] on the oldest. I = 1 is a scale.
      bias: (D,) or None.
      initial_state: (B, I-1, D), the inputs before the first token, oldest first; None is zeros. It belongs to the
        first token's document and is rounded to x's dtype.
      segment_ids: int (B, T); a document is a run of equal ids, and no tap reaches from one into another.
      implementation: 'shifted', 'reference', or None for the best here.

    Returns:
      y_BTD in x's dtype (sums are float32 or wider), and the tail (B, I-1, D) in x's dtype: the last I-1 inputs of the
      last token's document, zeros before them. Given as the next call's initial_state, it continues exactly.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    operator = "causal_conv"
    if x_BTD.ndim != 3 or x_BTD.shape[1] == 0:
        raise ValueError(f"{operator}: x must be (B, T, D) with T > 0; got {x_BTD.shape}")
    if not jnp.issubdtype(x_BTD.dtype, jnp.inexact):
        raise ValueError(f"{operator}: x must be floating or complex; got {x_BTD.dtype}")
    B, T, D = x_BTD.shape
    if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != D:
        raise ValueError(
            f"{operator}: w must be (width, D) with width > 0 and x's D = {D}; got {w.shape}"
        )
    width = w.shape[0]
    if bias is not None:
        arguments.check_shape(operator, "bias", bias, (D,))
    if initial_state is None:
        initial_state = jnp.zeros((B, width - 1, D), x_BTD.dtype)
    arguments.check_shape(operator, "initial_state", initial_state, (B, width - 1, D))
    start_BT = None
    if segment_ids is not None:
        arguments.check_shape(operator, "segment_ids", segment_ids, (B, T))
        start_BT = segments.starts(segment_ids)
    chosen = dispatch.choose(operator, IMPLEMENTATIONS, implementation)
    return chosen.call(x_BTD, w, bias, initial_state.astype(x_BTD.dtype), start_BT)
