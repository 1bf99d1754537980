"""What one rank's stretch of time makes of the state that enters it, and what its tokens read of
that state.

The parts of `sequence_parallel` that collective nothing, one recurrence after the other, and the
diagonal scan whole, whose backward pass collectives in its middle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas
from kernels_pallas.common import arguments, decay, dtypes, matmul, segments
from kernels_pallas.context_parallel import collectives


def documents(segment_ids_BT):
    """Each token's document, counted from the stretch's first; ids of the first and the last one.
    None without ids."""
    if segment_ids_BT is None:
        return None, None, None
    return segments.run_index(segment_ids_BT), segment_ids_BT[:, 0], segment_ids_BT[:, -1]


def written(k_BTGK, v_BTHV, log_decay_BTHX, run_BT):
    """What a stretch leaves of its own, (B, H, K, V), and what remains of a state that entered, (B,
    H, X, 1)."""
    B, T, H, V = v_BTHV.shape
    after, total = None, jnp.ones_like(v_BTHV, arguments.state_dtype(v_BTHV), (B, 1, 1))
    if log_decay_BTHX is not None:
        after = jnp.exp(decay.g_reversed(log_decay_BTHX))
        total = jnp.exp(jnp.sum(log_decay_BTHX, axis=1))
    if run_BT is not None:
        leaves_BT11 = (run_BT == run_BT[:, -1:])[:, :, None, None]
        after = jnp.where(leaves_BT11, 1.0 if after is None else after, 0.0)
        total = jnp.where((run_BT[:, -1] == 0)[:, None, None], total, 0.0)
    if after is not None and after.shape[-1] > 1:
        k_BTGK = dtypes.multiply(arguments.repeat_heads(k_BTGK, H), after)
    elif after is not None:
        v_BTHV = dtypes.multiply(v_BTHV, after)
    G, K = k_BTGK.shape[2:]
    local_BGKW = matmul.einsum("BTGK,BTGW->BGKW", k_BTGK, v_BTHV.reshape(B, T, G, -1))
    local_BGRKV = jnp.moveaxis(local_BGKW.reshape(B, G, K, H // G, V), 3, 2)
    return local_BGRKV.reshape(B, H, K, V), total[..., None]


def read(q_BTGK, state_BHKV, log_decay_BTHX, run_BT):
    """What each token reads of the state that entered: (B, T, H, V), float32 or wider."""
    H = state_BHKV.shape[1]
    through = None
    if log_decay_BTHX is not None:
        through = jnp.exp(decay.g_cumsum(log_decay_BTHX))
    if run_BT is not None:
        enters_BT11 = (run_BT == 0)[:, :, None, None]
        through = jnp.where(enters_BT11, 1.0 if through is None else through, 0.0)
    if through is not None and through.shape[-1] > 1:
        q_BTGK, through = dtypes.multiply(arguments.repeat_heads(q_BTGK, H), through), None
    B, T, G, K = q_BTGK.shape
    state_BGKW = jnp.moveaxis(state_BHKV.reshape(B, G, H // G, K, -1), 2, 3).reshape(B, G, K, -1)
    o_BTHV = matmul.einsum("BTGK,BGKW->BTGW", q_BTGK, state_BGKW).reshape(B, T, H, -1)
    return o_BTHV if through is None else o_BTHV * through


def by_map(name, form, operator, q_BTGK, v_BTHV, initial_state, segment_ids_BT):
    """A recurrence whose stretch maps a state S to M S + L, run once for both with K columns more."""
    arguments.check_segment_ids(name, segment_ids_BT, v_BTHV)
    (B, T, H, V), K = v_BTHV.shape, q_BTGK.shape[-1]
    zero_BHKV = arguments.normal_initial_state(name, None, q_BTGK, v_BTHV)
    entered_BHKV = arguments.normal_initial_state(name, initial_state, q_BTGK, v_BTHV)
    if arguments.nothing(q_BTGK, v_BTHV):
        return jnp.zeros_like(v_BTHV), form.ranks.of_last(entered_BHKV)
    identity_BHKK = jnp.broadcast_to(jnp.eye(K, dtype=zero_BHKV.dtype)[None, None], (B, H, K, K))
    values_BTHX = jnp.concatenate([v_BTHV, jnp.zeros_like(v_BTHV, shape=(B, T, H, K))], axis=-1)
    start_BHKX = jnp.concatenate([zero_BHKV, identity_BHKK], axis=-1)
    o_BTHX, final_BHKX = operator(values_BTHX, start_BHKX)
    _, first_B, last_B = documents(segment_ids_BT)
    state_BHKV, final_BHKV = collectives.entering(
        form, final_BHKX[..., :V], final_BHKX[..., V:], first_B, last_B, initial_state
    )
    read_BTHV = matmul.einsum("BTHK,BHKV->BTHV", o_BTHX[..., V:], state_BHKV)
    o_BTHV = (o_BTHX[..., :V].astype(read_BTHV.dtype) + read_BTHV).astype(v_BTHV.dtype)
    return o_BTHV, final_BHKV.astype(entered_BHKV.dtype)


class ScanCall(NamedTuple):
    """What is fixed at tracing."""

    form: collectives.Form
    reverse: bool
    implementation: str | None

    def local(self, x_BTD, decay_BTD, state_BD):
        return kernels_pallas.diagonal_scan(
            x_BTD,
            decay_BTD,
            initial_state=state_BD,
            reverse=self.reverse,
            implementation=self.implementation,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(call, x_BTD, decay_BTD, initial_BD, ends):
    """The stretch's h, and the state it leaves."""
    return _scan_forward(call, x_BTD, decay_BTD, initial_BD, ends)[0]


def _scan_forward(call, x_BTD, decay_BTD, initial_BD, ends):
    total_BD, local_BD = _composed(decay_BTD, x_BTD.astype(decay_BTD.dtype), call.reverse)
    entered_BD = jnp.where(call.form.ranks.index == 0, initial_BD, 0)
    local_BD = local_BD + collectives.decayed(total_BD, entered_BD)
    state_BD, joined_B = collectives.prefix_state(call.form, local_BD, total_BD, ends)
    results, vjp = jax.vjp(call.local, x_BTD, decay_BTD, entered_BD + state_BD)
    return results, (vjp, decay_BTD, total_BD, joined_B)


def _scan_backward(call, saved, cotangents):
    vjp, decay_BTD, total_BD, joined_B = saved
    g_BTD, g_leaving_BD = cotangents
    # Of the entering state's cotangent, what does not come from later ranks: g_t goes back through
    # a_t to a_1.
    back_BTD = decay_BTD * g_BTD.astype(decay_BTD.dtype)
    _, g_BD = _composed(decay_BTD, back_BTD, not call.reverse)
    g_BD = g_BD + collectives.decayed(total_BD, g_leaving_BD)
    from_later_BD = collectives.prefix_state_gradient(call.form, g_BD, total_BD, joined_B)
    d_x_BTD, d_decay_BTD, d_state_BD = vjp((g_BTD, g_leaving_BD + from_later_BD))
    d_initial_BD = jnp.where(call.form.ranks.index == 0, d_state_BD, 0)
    return d_x_BTD, d_decay_BTD, d_initial_BD, (None, None)


scan.defvjp(_scan_forward, _scan_backward)


def _composed(decay_BTD, x_BTD, reverse):
    """All tokens' maps h -> a h + x, one after the other, as one: its decay and its addend, (B, D).

    Eight maps at a time are one fused pass over what they read.
    """
    while (T := x_BTD.shape[1]) > 1:
        C = min(8, T)
        padding = ((0, 0), (0, -T % C), (0, 0))
        decay_BNCD, x_BNCD = (
            jnp.pad(z, padding, constant_values=fill).reshape(z.shape[0], -1, C, z.shape[2])
            for z, fill in ((decay_BTD, 1), (x_BTD, 0))
        )
        first, *others = range(C)[::-1] if reverse else range(C)
        decay_BTD, x_BTD = decay_BNCD[:, :, first], x_BNCD[:, :, first]
        for i in others:
            x_BTD = collectives.decayed(decay_BNCD[:, :, i], x_BTD) + x_BNCD[:, :, i]
            decay_BTD = collectives.decayed(decay_BNCD[:, :, i], decay_BTD)
    return decay_BTD[:, 0], x_BTD[:, 0]
