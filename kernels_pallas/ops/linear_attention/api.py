"""Linear attention with any decay: the public functions."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, segments
from kernels_pallas.dispatch import explicit_axes
from kernels_pallas.ops.linear_attention import chunked, gpu, naive_chunk, reference, tpu
from kernels_pallas.ops.linear_attention.case import CASE


def _one_token(*, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, scale, **others):
    del others  # one token starts no document, so the state enters
    dtype, H = initial_state_BHKV.dtype, v_BTHV.shape[2]
    q_BHK, k_BHK = (arguments.repeat_heads(x, H)[:, 0].astype(dtype) for x in (q_BTGK, k_BTGK))
    log_decay_BHK = None if log_decay_BTHK is None else log_decay_BTHK[:, 0]
    o_BHV, state_BHKV = reference.step(
        q_BHK, k_BHK, v_BTHV[:, 0].astype(dtype), log_decay_BHK, initial_state_BHKV
    )
    return (scale * o_BHV)[:, None].astype(v_BTHV.dtype), state_BHKV


def _reference(*, q_BTGK, k_BTGK, v_BTHV, chunk_size, **call):
    del chunk_size
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    return reference.recurrent(q_BTHK, k_BTHK, v_BTHV, **call)


IMPLEMENTATIONS = (
    dispatch.Implementation("one_token", _one_token, arguments.not_one_token),
    dispatch.Implementation("pallas_tpu", tpu.run, tpu.unsupported_reason, platform="tpu"),
    dispatch.Implementation("triton", gpu.run, gpu.unsupported_reason, platform="gpu"),
    dispatch.Implementation("chunked", segments.isolated(chunked.run)),
    dispatch.Implementation("naive_chunk", segments.isolated(naive_chunk.run)),
    dispatch.Implementation("reference", _reference),
)


@explicit_axes.automatic(("BTHV", "BHKV"), q_BTHK="BTGK", v_BTHV="BTHV")
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
    """Computes linear attention, with any decay or none:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    Without a decay this is linear attention (arXiv 2006.16236, eq. 9 without its normaliser). A
    fixed decay per head is RetNet (2307.08621) and Lightning Attention (2401.04658). One per token
    and head is Mamba-2's SSD (2405.21060, with q, k, v = C, B, dt x) and mLSTM after its stabiliser
    (2405.04517). One per key channel is GLA (2312.06635, eq. 3), HGRN2 (2404.07904) and RWKV-6. Any
    T, K and V. Reverse mode only (a custom VJP), to any order.

    Args:
      q_BTHK: (B, T, G, K), floating; G divides H. Key head g serves the value heads from g H/G to
        (g+1) H/G - 1.
      k_BTHK: (B, T, G, K).
      v_BTHV: (B, T, H, V).
      log_decay: None (no decay), (H,), (B, T, H) or (B, T, H, K). Always <= 0; -inf forgets all
        that came before, and its gradient is 0. Positive values are not checked unless
        `kernels_pallas.common.checks` is on.
      scale: a number; None is K**-0.5. It multiplies the output while that is still float32.
      initial_state: (B, H, K, V), the state before the first token; None is zero. It belongs to the
        first token's document.
      segment_ids: integers (B, T). A document is a run of equal ids, and nothing crosses from one
        to another. This holds for NaN and Inf, too, except in kernels (where a reset is a product
        with 0), and except for what overflows in a chunk.
      chunk_size: a power of two, 16 or more; None is the implementation's own. It changes speed and
        rounding only.
      implementation: 'chunked', 'pallas_tpu', 'triton', 'one_token' (T = 1 only), 'reference', or
        None for the best here.

    Returns:
      o_BTHV in v's dtype, and the final state (B, H, K, V). States, gates and their sums are
      float32 (float64 where an input is). Products of bfloat16 q, k and v take them as they are and
      sum in float32; their results stay float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size or scale, an unknown
        implementation, or (with checks on) a positive log_decay.
      NotImplementedError: the named implementation cannot run this call.
    """
    name = "linear_attention"
    arguments.check_scale(name, scale)
    inputs = q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids, chunk_size
    call = arguments.recurrence(name, *inputs, state_as_wide_as_all=True)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), call["initial_state_BHKV"]
    call["scale"] = q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale)
    return dispatch.run(OPERATOR, implementation, **call)


OPERATOR = dispatch.Operator(linear_attention, IMPLEMENTATIONS, CASE)


def step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding, in constant time and memory.

    Args:
      q_BHK: (B, G, K), floating; G divides H.
      k_BHK: (B, G, K).
      v_BHV: (B, H, V).
      log_decay: None, (H,), (B, H) or (B, H, K), <= 0.
      scale: multiplies q; None is K**-0.5.
      state: (B, H, K, V), as `linear_attention` and `step` return it; None is zero.

    Returns:
      o_BHV in v's dtype, and the next state, in float32 or wider.

    Raises:
      ValueError: shapes or dtypes that do not fit, named as for `linear_attention` with T = 1.
    """
    arrays = {"q": q_BHK, "k": k_BHK, "v": v_BHV}
    name = "linear_attention.step"
    return arguments.step(linear_attention, name, log_decay, scale, state, **arrays)
