"""The short causal convolution as I shifted multiply-adds, with its own backward pass.

XLA fuses them into one pass (docs/math/causal_conv.md). A tap counts where its input and its output
lie in one document. The backward pass computes the sums z again, and differentiates activation and
norm there: its residuals are the arguments alone. `lax.conv_general_dilated` with D feature groups
is the same sum, and much slower on CPU (docs/results.md).
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import dtypes, segments
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.ops.causal_conv import reference


def run(x_BTD, w, bias, initial_state, start_BT, finish):
    """Computes the convolution by shifted multiply-adds; returns (y_BTD, the last I-1 inputs)."""
    entered_BSD = jnp.concatenate([initial_state, x_BTD], axis=1)
    run_BS = None
    if start_BT is not None:  # the initial state is in document 0
        run_BS = jnp.pad(segments.count_starts(start_BT), ((0, 0), (w.shape[0] - 1, 0)))
    y_BTD = _finished(finish, entered_BSD, w, bias, run_BS)
    return y_BTD, reference.tail(x_BTD, initial_state, start_BT)


def _in_document(tap_BTD, run_BS, first, second, length):
    """Returns a tap's inputs, 0 where input and output lie in two documents.

    first, second: the columns of run_BS, which numbers documents, where the inputs and the outputs
      begin.
    """
    if run_BS is None or first == second:
        return tap_BTD
    same_BT = run_BS[:, first : first + length] == run_BS[:, second : second + length]
    return jnp.where(same_BT[..., None], tap_BTD, 0)


@custom_vjp(0)
def _finished(finish, entered_BSD, w, bias, run_BS):
    return finish(_sums(entered_BSD, w, bias, run_BS)).astype(entered_BSD.dtype)


def _sums(entered_BSD, w, bias, run_BS):
    """Computes z_t = bias + sum_i w_i e_{t+i}, where e is I-1 earlier inputs and then T of x."""
    width, S = w.shape[0], entered_BSD.shape[1]
    T = S - (width - 1)
    dtype = dtypes.common(entered_BSD.dtype, w.dtype, jnp.float32)
    z_BTD = 0 if bias is None else bias.astype(dtype)[None, None]
    for i in range(width):
        tap_BTD = _in_document(entered_BSD[:, i : i + T], run_BS, i, width - 1, T)
        z_BTD = z_BTD + tap_BTD.astype(dtype) * w[i].astype(dtype)[None, None]
    return z_BTD


def _forward(finish, entered_BSD, w, bias, run_BS):
    return _finished(finish, entered_BSD, w, bias, run_BS), (entered_BSD, w, bias, run_BS)


def _backward(finish, saved, dy_BTD):
    entered_BSD, w, bias, run_BS = saved
    width, (_, T, _) = w.shape[0], dy_BTD.shape
    margin = width - 1
    # dz, from y = finish(z), z computed again
    _, finish_vjp = jax.vjp(finish, _sums(entered_BSD, w, bias, run_BS))
    dtype = dtypes.common(entered_BSD.dtype, w.dtype, jnp.float32)
    (g_BTD,) = finish_vjp(dy_BTD.astype(dtype))
    padded_g = jnp.pad(g_BTD, ((0, 0), (margin, margin), (0, 0)))
    # -1 is no document; what stands beyond the ends is 0
    padded_run = (
        None if run_BS is None else jnp.pad(run_BS, ((0, 0), (0, margin)), constant_values=-1)
    )
    # de_p = sum_i w_i dz_{p-i}, dw_i = sum_{b,t} dz_t e_{t+i}
    d_entered_BSD: Any = 0
    dw = []
    for i in range(width):
        lag, S = margin - i, T + margin
        later_BSD = _in_document(padded_g[:, lag : lag + S], padded_run, 0, lag, S)
        d_entered_BSD = d_entered_BSD + later_BSD * w[i].astype(dtype)[None, None]
        tap_BTD = _in_document(entered_BSD[:, i : i + T], run_BS, i, margin, T)
        dw.append(jnp.sum(g_BTD * tap_BTD.astype(dtype), axis=(0, 1)))
    d_bias = None
    if bias is not None:
        d_bias = reference.demoted(jnp.sum(g_BTD, axis=(0, 1)), bias.dtype)
    dw = reference.demoted(jnp.stack(dw), w.dtype)
    return d_entered_BSD.astype(entered_BSD.dtype), dw, d_bias, None


_finished.defvjp(_forward, _backward)
