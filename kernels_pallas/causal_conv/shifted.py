"""The short causal convolution as I shifted multiply-adds, which XLA fuses into one pass, with its own backward pass.

Let e be the I-1 inputs that enter followed by x. Then y_t = sum_i w_i e_{t+i}, so

    de_p = sum_i w_i g_{p-i}        dw_i = sum_{b,t} g_t e_{t+i}

each again I shifted products. A tap counts where both its ends lie in one document. `lax.conv_general_dilated` with
D feature groups is the same sum; on two CPU cores it was 15 to 450 times slower at width 4 and 100 at width 16.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import segments


def shifted(x_BTD, w, bias, initial_state, start_BT):
    """Same contract as `reference.recurrent`."""
    width, T = w.shape[0], x_BTD.shape[1]
    entered_BSD = jnp.concatenate([initial_state, x_BTD], axis=1)
    run_BS = None
    tail = entered_BSD[:, T:]
    if start_BT is not None:
        run_BT = segments.count_starts(start_BT)
        run_BS = jnp.pad(
            run_BT, ((0, 0), (width - 1, 0))
        )  # what entered belongs to the first token's run, 0
        tail = jnp.where((run_BS[:, T:] == run_BS[:, -1:])[..., None], tail, 0)
    y_BTD = _taps(entered_BSD, w, run_BS)
    if bias is not None:
        y_BTD = y_BTD + bias.astype(y_BTD.dtype)[None, None]
    return y_BTD.astype(x_BTD.dtype), tail


def _kept(tap_BTD, run_BS, first, second, length):
    """The tap, zero where its two ends (beginning at `first` and `second` of run_BS) lie in different documents."""
    if run_BS is None or first == second:
        return tap_BTD
    same_BT = run_BS[:, first : first + length] == run_BS[:, second : second + length]
    return jnp.where(same_BT[..., None], tap_BTD, 0)


@jax.custom_vjp
def _taps(entered_BSD, w, run_BS):
    """y in float32 or wider, of T = S - (I-1) tokens."""
    width, S = w.shape[0], entered_BSD.shape[1]
    T = S - (width - 1)
    dtype = jnp.result_type(entered_BSD.dtype, w.dtype, jnp.float32)
    y_BTD = 0
    for i in range(width):
        tap_BTD = _kept(entered_BSD[:, i : i + T], run_BS, i, width - 1, T)
        y_BTD = y_BTD + tap_BTD.astype(dtype) * w[i].astype(dtype)[None, None]
    return y_BTD


def _forward(entered_BSD, w, run_BS):
    return _taps(entered_BSD, w, run_BS), (entered_BSD, w, run_BS)


def _backward(saved, g_BTD):
    entered_BSD, w, run_BS = saved
    width, (_, T, _) = w.shape[0], g_BTD.shape
    margin = width - 1
    padded_g = jnp.pad(g_BTD, ((0, 0), (margin, margin), (0, 0)))
    # -1 is no document: what would come from beyond the ends is zero in any case.
    padded_run = (
        None if run_BS is None else jnp.pad(run_BS, ((0, 0), (0, margin)), constant_values=-1)
    )
    d_entered_BSD, dw = 0, []
    for i in range(width):
        lag, S = margin - i, T + margin
        later_BSD = _kept(padded_g[:, lag : lag + S], padded_run, 0, lag, S)
        d_entered_BSD = d_entered_BSD + later_BSD * w[i].astype(g_BTD.dtype)[None, None]
        tap_BTD = _kept(entered_BSD[:, i : i + T], run_BS, i, margin, T)
        dw.append(jnp.sum(g_BTD * tap_BTD.astype(g_BTD.dtype), axis=(0, 1)))
    return d_entered_BSD.astype(entered_BSD.dtype), jnp.stack(dw).astype(w.dtype), None


_taps.defvjp(_forward, _backward)
