"""Linear attention with any decay: the public function."""

import jax

from kernels_pallas import dispatch
from kernels_pallas import recurrence_arguments as arguments
from kernels_pallas.linear_attention import reference


def _reference(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size):
    del chunk_size
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    return reference.recurrent(
        q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT
    )


IMPLEMENTATIONS = (dispatch.Implementation("reference", _reference),)


def linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t."""
    name = "linear_attention"
    arguments.check_qkv(name, q_BTHK, k_BTHK, v_BTHV)
    B, T = v_BTHV.shape[:2]
    if segment_ids is not None:
        arguments.check_shape(name, "segment_ids", segment_ids, (B, T))
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    call = {
        "q_BTGK": q_BTHK * scale,
        "k_BTGK": k_BTHK,
        "v_BTHV": v_BTHV,
        "log_decay_BTHK": arguments.normal_log_decay(name, log_decay, q_BTHK, v_BTHV),
        "initial_state_BHKV": arguments.normal_initial_state(name, initial_state, q_BTHK, v_BTHV),
        "segment_ids_BT": segment_ids,
        "chunk_size": chunk_size,
    }
    return dispatch.choose(name, IMPLEMENTATIONS, implementation, **call).call(**call)
