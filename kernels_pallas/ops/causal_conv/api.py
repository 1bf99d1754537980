"""Short depthwise causal convolution with state and packed documents: the public function."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, chunk_blocks, segments
from kernels_pallas.dispatch import explicit_axes
from kernels_pallas.ops.causal_conv import reference, shifted, tpu
from kernels_pallas.ops.causal_conv.case import CASE

FEW_TOKENS = 16


def _too_few(*, x_BTD, **others):
    T = x_BTD.shape[1]
    if chunk_blocks.known(T) and T < FEW_TOKENS:
        return f"for T = {T} tokens XLA's form is as fast"
    return None


IMPLEMENTATIONS = (
    dispatch.Implementation("pallas_tpu", tpu.run, tpu.unsupported_reason, "tpu", _too_few),
    dispatch.Implementation("shifted", shifted.run),
    dispatch.Implementation("reference", reference.recurrent),
)


@explicit_axes.automatic(("BTD", "BSD"), x_BTD="BTD")
def causal_conv(
    x_BTD: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    l2_norm_heads: int | None = None,
    eps: float = 1e-6,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes a short depthwise causal convolution of width I, an activation and a norm:

        z_t = bias + sum_{i=0}^{I-1} w_i * x_{t-(I-1)+i}
        a_t = z_t, or silu(z_t) = z_t * sigmoid(z_t)
        y_t = a_t, or for each of H heads of D / H channels  a_t / sqrt(sum(a_t^2) + eps)

    This is the convolution before Mamba's and the delta rules' recurrences (arXiv 2312.00752,
    section 3.4), with the norm that the latter have on q and k (2406.06484, section 3.3). Work and
    memory grow with T * I: made for widths of 2 to 32 or so.

    Args:
      x_BTD: (B, T, D), floating or complex; any T, also below I-1.
      w: (I, D). w[-1] is on the current token, w[0] on the oldest. I = 1 is a scale.
      bias: (D,) or None.
      activation: None or 'silu'.
      l2_norm_heads: H, or None for no norm. With it x must be real.
      eps: of the norm.
      initial_state: (B, I-1, D), the inputs before the first token, oldest first; None is zeros. It
        belongs to the first token's document and is rounded to x's dtype. If it is complex where x
        is real, the tail is complex.
      segment_ids: int (B, T). A document is a run of equal ids, and no tap reaches from one into
        another.
      implementation: 'pallas_tpu' (float32 and bfloat16, widths to 17), 'shifted' (XLA),
        'reference', or None for the best here. Below 16 tokens None takes no kernel.

    Returns:
      y_BTD in x's dtype (complex where w, the bias or the initial state makes it so; sums are
      float32 or wider), and the tail (B, I-1, D) in x's dtype: the last I-1 inputs of the last
      token's document, after zeros where there are fewer. Given as the next call's initial_state,
      it continues exactly.

    Raises:
      ValueError: shapes that do not fit, or an unknown activation or implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    operator = "causal_conv"
    arguments.check_array(operator, "x", x_BTD)
    arguments.check_array(operator, "w", w)
    if x_BTD.ndim != 3:
        raise ValueError(f"{operator}: x must be (B, T, D); got {x_BTD.shape}")
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
        initial_state = jnp.zeros_like(x_BTD, shape=(B, width - 1, D))
    arguments.check_shape(operator, "initial_state", initial_state, (B, width - 1, D))
    tail_dtype = reference.promoted(x_BTD, initial_state).dtype
    x_BTD = reference.promoted(x_BTD, w, bias, initial_state)
    start_BT = None
    if segment_ids is not None:
        arguments.check_segment_ids(operator, segment_ids, x_BTD)
        start_BT = segments.starts(segment_ids)
    call = {
        "x_BTD": x_BTD,
        "w": w,
        "bias": bias,
        "initial_state": initial_state.astype(x_BTD.dtype),
        "start_BT": start_BT,
        "finish": reference.finish_of(x_BTD, activation, l2_norm_heads, eps),
    }
    if arguments.nothing(x_BTD):
        tail = call["initial_state"] if T == 0 else jnp.zeros_like(call["initial_state"])
        return jnp.zeros_like(x_BTD), reference.demoted(tail, tail_dtype)
    y_BTD, tail = dispatch.run(OPERATOR, implementation, **call)
    return y_BTD, reference.demoted(tail, tail_dtype)


OPERATOR = dispatch.Operator(causal_conv, IMPLEMENTATIONS, CASE)
