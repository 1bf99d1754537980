"""A shard of a sequence as an affine map S -> D S + L of the state S that enters it.

`local_state` computes L and D, and `read_state` what the shard's tokens read of S; both stay on one
rank. `by_transition_matrix` and `scan` run a whole operator, collectives included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas
from kernels_pallas.common import arguments, decay, dtypes, matmul, segments
from kernels_pallas.common.dtypes import custom_vjp
from kernels_pallas.context_parallel import collectives
from kernels_pallas.dispatch import manual_axes


def documents(segment_ids_BT):
    """Returns run_BT, first_B, last_B of a shard's document ids; three Nones without ids.

    run_BT is each token's document number, 0 for the shard's first document; first_B and last_B are
    the ids of the shard's first and last token.
    """
    if segment_ids_BT is None:
        return None, None, None
    return segments.run_index(segment_ids_BT), segment_ids_BT[:, 0], segment_ids_BT[:, -1]


def local_state(k_BTGK, v_BTHV, log_decay_BTHX, run_BT):
    """Returns a shard's local state L (B, H, K, V) and total decay D (B, H, X, 1).

        L = sum_t diag(exp(g_reversed_t)) k_t v_t^T        D = exp(g_total)

    L sums over the tokens of the shard's last document, g_reversed_t being the log decay after t up
    to the shard's end. D is 0 where a document begins inside the shard. X is K for a decay per
    channel, else 1.

    run_BT: each token's document number, 0 for the shard's first document; None is one document.
    """
    B, T, H, V = v_BTHV.shape
    # Each token's decay up to the shard's end, and the whole shard's.
    decay_BTHX, total_BHX = None, jnp.ones_like(v_BTHV, arguments.state_dtype(v_BTHV), (B, 1, 1))
    if log_decay_BTHX is not None:
        decay_BTHX = jnp.exp(decay.g_reversed(log_decay_BTHX))
        total_BHX = jnp.exp(jnp.sum(log_decay_BTHX, axis=1))
    if run_BT is not None:
        last_BT11 = (run_BT == run_BT[:, -1:])[:, :, None, None]
        decay_BTHX = jnp.where(last_BT11, 1.0 if decay_BTHX is None else decay_BTHX, 0.0)
        total_BHX = jnp.where((run_BT[:, -1] == 0)[:, None, None], total_BHX, 0.0)
    # A decay per channel goes to k, another to v, whose heads need no copies.
    if decay_BTHX is not None and decay_BTHX.shape[-1] > 1:
        k_BTGK = dtypes.multiply(arguments.repeat_heads(k_BTGK, H), decay_BTHX)
    elif decay_BTHX is not None:
        v_BTHV = dtypes.multiply(v_BTHV, decay_BTHX)
    # L, one product per key head.
    G, K = k_BTGK.shape[2:]
    local_BGKW = matmul.einsum("BTGK,BTGW->BGKW", k_BTGK, v_BTHV.reshape(B, T, G, -1))
    local_BGRKV = jnp.moveaxis(local_BGKW.reshape(B, G, K, H // G, V), 3, 2)
    return local_BGRKV.reshape(B, H, K, V), total_BHX[..., None]


def read_state(q_BTGK, state_BHKV, log_decay_BTHX, run_BT):
    """Returns what each token of a shard reads of the entering state S: (B, T, H, V).

        o_t = S^T diag(exp(g_cumsum_t)) q_t

    and 0 beyond the shard's first document, in float32 or wider. run_BT: each token's document
    number, 0 for the shard's first document; None is one document.
    """
    H = state_BHKV.shape[1]
    decay_BTHX = None
    if log_decay_BTHX is not None:
        decay_BTHX = jnp.exp(decay.g_cumsum(log_decay_BTHX))
    if run_BT is not None:
        first_BT11 = (run_BT == 0)[:, :, None, None]
        decay_BTHX = jnp.where(first_BT11, 1.0 if decay_BTHX is None else decay_BTHX, 0.0)
    # A decay per channel goes to q, another to the output.
    if decay_BTHX is not None and decay_BTHX.shape[-1] > 1:
        q_BTGK = dtypes.multiply(arguments.repeat_heads(q_BTGK, H), decay_BTHX)
        decay_BTHX = None
    B, T, G, K = q_BTGK.shape
    state_BGKW = jnp.moveaxis(state_BHKV.reshape(B, G, H // G, K, -1), 2, 3).reshape(B, G, K, -1)
    o_BTHV = matmul.einsum("BTGK,BGKW->BTGW", q_BTGK, state_BGKW).reshape(B, T, H, -1)
    return o_BTHV if decay_BTHX is None else o_BTHV * decay_BTHX


def by_transition_matrix(operator, inputs, how, keywords):
    """Returns (o_BTHV, final_BHKV) of an operator whose shard maps a state S to M S + L.

    M is a matrix (K, K) per head. The operator is linear in v and its initial state together, so
    that one run with K more columns of values gives L and M, and both terms of the outputs.

    operator: `kernels_pallas.delta_rule` or `diagonal_plus_low_rank`.
    inputs: (q, k, v, the operator's further arrays, initial_state, segment_ids).
    how: (axis_name, collective, blocks). keywords: the operator's other keywords.
    """
    name = operator.__name__
    arguments.check_qkv(name, *inputs[:3])
    axis_name, collective, blocks = how
    columns = inputs[2].shape[-1]
    form = collectives.form(name, axis_name, collective, blocks, columns, matrix=True)
    inputs = manual_axes.alike(inputs, form.ranks.axis_name)
    q_BTGK, k_BTGK, v_BTHV, *others, initial_state, segment_ids_BT = inputs
    arguments.check_segment_ids(name, segment_ids_BT, v_BTHV)
    (B, T, H, V), K = v_BTHV.shape, q_BTGK.shape[-1]
    zero_BHKV = arguments.normal_initial_state(name, None, q_BTGK, v_BTHV)
    initial_BHKV = arguments.normal_initial_state(name, initial_state, q_BTGK, v_BTHV)
    if arguments.nothing(q_BTGK, v_BTHV):
        return jnp.zeros_like(v_BTHV), form.ranks.from_last(initial_BHKV)
    # Values [v, 0] from the state [0, I] give outputs [o, O] and final states [L, M].
    identity_BHKK = jnp.broadcast_to(jnp.eye(K, dtype=zero_BHKV.dtype)[None, None], (B, H, K, K))
    v_BTHX = jnp.concatenate([v_BTHV, jnp.zeros_like(v_BTHV, shape=(B, T, H, K))], axis=-1)
    state_BHKX = jnp.concatenate([zero_BHKV, identity_BHKK], axis=-1)
    state = {"initial_state": state_BHKX, "segment_ids": segment_ids_BT}
    o_BTHX, final_BHKX = operator(q_BTGK, k_BTGK, v_BTHX, *others, **state, **keywords)
    # Sent: L and M (all_gather), or M S + L (all_scan, ring).
    _, first_B, last_B = documents(segment_ids_BT)
    state_BHKV, final_BHKV = collectives.entering_state(
        form, final_BHKX[..., :V], final_BHKX[..., V:], first_B, last_B, initial_state
    )
    # o_t += O_t S
    read_BTHV = matmul.einsum("BTHK,BHKV->BTHV", o_BTHX[..., V:], state_BHKV)
    o_BTHV = (o_BTHX[..., :V].astype(read_BTHV.dtype) + read_BTHV).astype(v_BTHV.dtype)
    return o_BTHV, final_BHKV.astype(initial_BHKV.dtype)


class ScanCall(NamedTuple):
    """Options of a diagonal scan over a sequence whose time is split over ranks.

    form: how states pass between ranks. reverse: whether time runs from the last token to the
      first. implementation: that of `kernels_pallas.diagonal_scan`.
    """

    form: collectives.CollectiveForm
    reverse: bool
    implementation: str | None

    def local(self, x_BTD, decay_BTD, state_BD):
        how = {"reverse": self.reverse, "implementation": self.implementation}
        return kernels_pallas.diagonal_scan(x_BTD, decay_BTD, initial_state=state_BD, **how)


@custom_vjp(0)
def scan(call, x_BTD, decay_BTD, initial_BD, ends):
    """Returns the states h (B, T, D) of a shard's tokens, and the state after the shard, (B, D).

        h_t = decay_t * h_{t-1} + x_t, from the state that earlier shards leave

    initial_BD: the state before the whole sequence. ends: document ids of the tokens that this scan
      reads first and last in the shard, (B,) each, or (None, None).
    """
    return _scan_forward(call, x_BTD, decay_BTD, initial_BD, ends)[0]


def _scan_forward(call, x_BTD, decay_BTD, initial_BD, ends):
    # D and L of this shard; the initial state enters the first shard alone.
    total_BD, local_BD = _composed(decay_BTD, x_BTD.astype(decay_BTD.dtype), call.reverse)
    initial_BD = jnp.where(call.form.ranks.index == 0, initial_BD, 0)
    local_BD = local_BD + collectives.decayed(total_BD, initial_BD)
    # Sent: L and D. Then the operator runs from the state that enters.
    state_BD, joined_B = collectives.prefix_state(call.form, local_BD, total_BD, ends)
    results, vjp = jax.vjp(call.local, x_BTD, decay_BTD, initial_BD + state_BD)
    return results, (vjp, decay_BTD, total_BD, joined_B)


def _scan_backward(call, saved, cotangents):
    vjp, decay_BTD, total_BD, joined_B = saved
    g_BTD, g_final_BD = cotangents
    # The prefix state's cotangent from this shard: sum_t a_1 ... a_t g_t + D g_final.
    back_BTD = decay_BTD * g_BTD.astype(decay_BTD.dtype)
    _, g_BD = _composed(decay_BTD, back_BTD, not call.reverse)
    g_BD = g_BD + collectives.decayed(total_BD, g_final_BD)
    # Sent: that and D, from later ranks to earlier ones. What arrives is the final state's.
    later_BD = collectives.prefix_state_gradient(call.form, g_BD, total_BD, joined_B)
    d_x_BTD, d_decay_BTD, d_state_BD = vjp((g_BTD, g_final_BD + later_BD))
    d_initial_BD = jnp.where(call.form.ranks.index == 0, d_state_BD, 0)
    return d_x_BTD, d_decay_BTD, d_initial_BD, (None, None)


scan.defvjp(_scan_forward, _scan_backward)


def _composed(decay_BTD, x_BTD, reverse):
    """Composes the maps h -> decay_t h + x_t of all tokens into one; returns its decay and addend.

    Both are (B, D). Eight tokens' maps are composed in each fused pass.
    """
    while (T := x_BTD.shape[1]) > 1:
        C = min(8, T)
        # h -> h fills the last group.
        padding = ((0, 0), (0, -T % C), (0, 0))
        decay_BNCD, x_BNCD = (
            jnp.pad(z, padding, constant_values=fill).reshape(z.shape[0], -1, C, z.shape[2])
            for z, fill in ((decay_BTD, 1), (x_BTD, 0))
        )
        # a_i (a h + x) + x_i, token by token of a group, all groups at once.
        first, *others = range(C)[::-1] if reverse else range(C)
        decay_BTD, x_BTD = decay_BNCD[:, :, first], x_BNCD[:, :, first]
        for i in others:
            x_BTD = collectives.decayed(decay_BNCD[:, :, i], x_BTD) + x_BNCD[:, :, i]
            decay_BTD = collectives.decayed(decay_BNCD[:, :, i], decay_BTD)
    return decay_BTD[:, 0], x_BTD[:, 0]
