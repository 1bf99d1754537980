"""The delta rule, and the general diagonal-plus-low-rank recurrence: the public functions."""

import jax

from kernels_pallas import dispatch
from kernels_pallas import recurrence_arguments as arguments
from kernels_pallas.delta_rule import reference


def _reference(
    q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size
):
    del chunk_size
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    return reference.recurrent(
        q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
    )


def _reference_diagonal_plus_low_rank(
    q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size
):
    del chunk_size
    return reference.recurrent_diagonal_plus_low_rank(
        q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
    )


IMPLEMENTATIONS = (dispatch.Implementation("reference", _reference),)
DIAGONAL_PLUS_LOW_RANK_IMPLEMENTATIONS = (
    dispatch.Implementation("reference", _reference_diagonal_plus_low_rank),
)


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    beta_BTH: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T;  o_t = scale * S_t^T q_t."""
    name = "delta_rule"
    arguments.check_qkv(name, q_BTHK, k_BTHK, v_BTHV)
    B, T, H, _ = v_BTHV.shape
    arguments.check_shape(name, "beta", beta_BTH, (B, T, H))
    if segment_ids is not None:
        arguments.check_shape(name, "segment_ids", segment_ids, (B, T))
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    call = {
        "q_BTGK": q_BTHK * scale,
        "k_BTGK": k_BTHK,
        "v_BTHV": v_BTHV,
        "beta_BTH": beta_BTH,
        "log_decay_BTHK": arguments.normal_log_decay(name, log_decay, q_BTHK, v_BTHV),
        "initial_state_BHKV": arguments.normal_initial_state(name, initial_state, q_BTHK, v_BTHV),
        "segment_ids_BT": segment_ids,
        "chunk_size": chunk_size,
    }
    return dispatch.choose(name, IMPLEMENTATIONS, implementation, **call).call(**call)


def diagonal_plus_low_rank(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    a_BTHK: jax.Array,
    b_BTHK: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = (diag(exp(log_decay_t)) + a_t b_t^T) S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t."""
    name = "diagonal_plus_low_rank"
    arguments.check_qkv(name, q_BTHK, k_BTHK, v_BTHV)
    B, T, H, _ = v_BTHV.shape
    for label, array in (("a", a_BTHK), ("b", b_BTHK)):
        arguments.check_shape(name, label, array, (B, T, H, q_BTHK.shape[3]))
    if segment_ids is not None:
        arguments.check_shape(name, "segment_ids", segment_ids, (B, T))
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    call = {
        "q_BTHK": arguments.repeat_heads(q_BTHK * scale, H),
        "k_BTHK": arguments.repeat_heads(k_BTHK, H),
        "v_BTHV": v_BTHV,
        "a_BTHK": a_BTHK,
        "b_BTHK": b_BTHK,
        "log_decay_BTHK": arguments.normal_log_decay(name, log_decay, q_BTHK, v_BTHV),
        "initial_state_BHKV": arguments.normal_initial_state(name, initial_state, q_BTHK, v_BTHV),
        "segment_ids_BT": segment_ids,
        "chunk_size": chunk_size,
    }
    implementations = DIAGONAL_PLUS_LOW_RANK_IMPLEMENTATIONS
    return dispatch.choose(name, implementations, implementation, **call).call(**call)
