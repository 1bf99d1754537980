"""The delta rule, and the general diagonal-plus-low-rank recurrence: the public functions."""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, segments
from kernels_pallas.dispatch import explicit_axes
from kernels_pallas.ops.delta_rule import chunked, gpu, naive_chunk, reference, tpu
from kernels_pallas.ops.delta_rule.case import CASE, DIAGONAL_PLUS_LOW_RANK_CASE


def _one_token(one_step, inputs, log_decay_BTHK, initial_state_BHKV):
    *inputs_BHK, log_decay_BHK = jax.tree.map(lambda x: x[:, 0], (*inputs, log_decay_BTHK))
    v_BHV, dtype = inputs_BHK[2], initial_state_BHKV.dtype
    inputs_BHK = (x.astype(dtype) for x in inputs_BHK)
    log_decay_BHK = None if log_decay_BHK is None else log_decay_BHK.astype(dtype)
    o_BHV, state_BHKV = one_step(*inputs_BHK, log_decay_BHK, initial_state_BHKV)
    return o_BHV[:, None].astype(v_BHV.dtype), state_BHKV


def _delta_rule_one_token(
    *, q_BTGK, k_BTGK, v_BTHV, beta_BTH, log_decay_BTHK, initial_state_BHKV, **others
):
    del others  # one token starts no document, so the state enters
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH)
    return _one_token(reference.step, inputs, log_decay_BTHK, initial_state_BHKV)


def _delta_rule_reference(*, q_BTGK, k_BTGK, v_BTHV, chunk_size, **call):
    del chunk_size
    q_BTHK, k_BTHK = (arguments.repeat_heads(x, v_BTHV.shape[2]) for x in (q_BTGK, k_BTGK))
    return reference.recurrent(q_BTHK, k_BTHK, v_BTHV, **call)


def _diagonal_plus_low_rank_one_token(
    *, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, **inputs
):
    del segment_ids_BT, chunk_size
    inputs = tuple(inputs[name] for name in ("q_BTHK", "k_BTHK", "v_BTHV", "a_BTHK", "b_BTHK"))
    step = reference.step_diagonal_plus_low_rank
    return _one_token(step, inputs, log_decay_BTHK, initial_state_BHKV)


def _diagonal_plus_low_rank_reference(*, chunk_size, **call):
    del chunk_size
    return reference.recurrent_diagonal_plus_low_rank(**call)


def _scaled(implementation):
    """Wraps an implementation that takes scaled q into one that takes q and scale.

    The product is in float32 or wider, lest q be rounded twice.
    """

    def call(*, q_BTGK, scale, **others):
        q_BTGK = q_BTGK.astype(arguments.state_dtype(q_BTGK)) * scale
        return implementation(q_BTGK=q_BTGK, **others)

    return call


def _scale_of(operator, scale, q_BTGK) -> tuple[float, jax.Array]:
    """Returns (scale as a number, q); a learned scale is multiplied into q, in float32 or wider."""
    if scale is None:
        return q_BTGK.shape[-1] ** -0.5, q_BTGK
    arguments.check_number_or_scalar(operator, "scale", scale)
    if arguments.is_number(scale):
        return float(scale), q_BTGK
    q_BTGK = q_BTGK.astype(arguments.state_dtype(q_BTGK))
    return 1.0, q_BTGK * scale.astype(q_BTGK.dtype)


IMPLEMENTATIONS = (
    dispatch.Implementation("one_token", _scaled(_delta_rule_one_token), arguments.not_one_token),
    dispatch.Implementation("pallas_tpu", tpu.run, tpu.unsupported_reason, "tpu"),
    dispatch.Implementation("triton", gpu.run, gpu.unsupported_reason, "gpu"),
    dispatch.Implementation("chunked", segments.isolated(chunked.run)),
    dispatch.Implementation("naive_chunk", segments.isolated(naive_chunk.run)),
    dispatch.Implementation("reference", _scaled(_delta_rule_reference)),
)
DIAGONAL_PLUS_LOW_RANK_IMPLEMENTATIONS = (
    dispatch.Implementation(
        "one_token", _diagonal_plus_low_rank_one_token, arguments.not_one_token
    ),
    dispatch.Implementation("chunked", segments.isolated(chunked.run_diagonal_plus_low_rank)),
    dispatch.Implementation(
        "naive_chunk", segments.isolated(naive_chunk.run_diagonal_plus_low_rank)
    ),
    dispatch.Implementation("reference", _diagonal_plus_low_rank_reference),
)


@explicit_axes.automatic(("BTHV", "BHKV"), q_BTHK="BTGK", v_BTHV="BTHV")
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
    """Computes the delta rule, with or without a decay.

    A token reads what the state holds for its key, and replaces a share beta of it by its value:

        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t

    The state decays first, and k reads the decayed state. DeltaNet (arXiv 2406.06484, eq. 3) has no
    decay, Gated DeltaNet (2412.06464, eq. 10) one per token and head, KDA of Kimi Linear
    (2510.26692, eq. 1) one per key channel. beta in (1, 2] gives the negative eigenvalues that
    state tracking needs (2411.12537), and DeltaProduct (2502.10297) is this operator on an unrolled
    time axis. Keys of norm 1 (or beta |k|^2 <= 2) keep the state bounded; nothing here normalises
    them. Any T, K and V. Reverse mode only (a custom VJP), to any order.

    Args:
      q_BTHK: (B, T, G, K), floating; G divides H. Key head g serves the value heads from g H/G to
        (g+1) H/G - 1.
      k_BTHK: (B, T, G, K).
      v_BTHV: (B, T, H, V).
      beta_BTH: (B, T, H), floating; 0 leaves the decayed state as it is.
      log_decay: None (no decay), (H,), (B, T, H) or (B, T, H, K). Always <= 0; -inf forgets all
        that came before, and its gradient is 0. Positive values are not checked unless
        `kernels_pallas.common.checks` is on.
      scale: multiplies q. A number, or a learned one of shape (); None is K**-0.5.
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
      o_BTHV in v's dtype, and the final state (B, H, K, V). All else is float32 (float64 where v
      is), for narrower inputs too: the values that a chunk's tokens write depend on each other, and
      rounding them to bfloat16 would leave one digit. Kernels give such operands to the matrix unit
      in two or more bfloat16 terms. The chunked form's products follow
      `jax_default_matmul_precision`; the inverse inside a chunk has the highest.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    name = "delta_rule"
    call = arguments.recurrence(
        name, q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids, chunk_size
    )
    arguments.check_shape(name, "beta", beta_BTH, v_BTHV.shape[:3])
    arguments.check_float(name, "beta", beta_BTH)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), call["initial_state_BHKV"]
    scale, call["q_BTGK"] = _scale_of(name, scale, q_BTHK)
    return dispatch.run(OPERATOR, implementation, **call, beta_BTH=beta_BTH, scale=scale)


OPERATOR = dispatch.Operator(delta_rule, IMPLEMENTATIONS, CASE)


@explicit_axes.automatic(("BTHV", "BHKV"), q_BTHK="BTGK", v_BTHV="BTHV")
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
    """Computes the delta rule's general form, with a diagonal plus rank-one transition:

        S_t = (diag(exp(log_decay_t)) + a_t b_t^T) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    b reads the state before it decays. RWKV-7 (arXiv 2503.14456) writes its state as (V, K), S_t =
    S_{t-1} (diag(w) - kk^T (eta * kk)) + v^T k and o = S r. It is this with q = r, log_decay = log
    w, a = -(eta * kk), b = kk, scale = 1 and the same k and v; eta is its in-context learning rate,
    kk its normalised removal key. The delta rule is a = -beta k, b = exp(log_decay) * k, k = beta
    k; its own function is faster. The state stays bounded where diag(exp(log_decay)) + a b^T does
    not stretch; nothing here enforces that. Any T, K and V. Reverse mode only (a custom VJP), to
    any order.

    Args:
      q_BTHK, k_BTHK, v_BTHV: as for `delta_rule`.
      a_BTHK: (B, T, H, K), floating: the direction in which what b read is written back.
      b_BTHK: (B, T, H, K), floating: reads S_{t-1}.
      log_decay: None (no decay), (H,), (B, T, H) or (B, T, H, K). Always <= 0; -inf clears a
        channel of diag(exp(.)), and its gradient is 0. Positive values are not checked unless
        `kernels_pallas.common.checks` is on.
      scale, initial_state, segment_ids, chunk_size: as for `delta_rule`.
      implementation: 'chunked', 'one_token' (T = 1 only), 'reference', or None for the best here.

    Returns:
      o_BTHV in v's dtype, and the final state (B, H, K, V); precision as for `delta_rule`.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    name = "diagonal_plus_low_rank"
    call = arguments.recurrence(
        name, q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids, chunk_size
    )
    H = v_BTHV.shape[2]
    for label, array in (("a", a_BTHK), ("b", b_BTHK)):
        arguments.check_shape(name, label, array, (*v_BTHV.shape[:3], q_BTHK.shape[3]))
        arguments.check_float(name, label, array)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), call["initial_state_BHKV"]
    scale, q_BTHK = _scale_of(name, scale, call.pop("q_BTGK"))
    q_BTHK = arguments.repeat_heads(q_BTHK.astype(arguments.state_dtype(q_BTHK)) * scale, H)
    call |= {"q_BTHK": q_BTHK, "k_BTHK": arguments.repeat_heads(call.pop("k_BTGK"), H)}
    call |= {"a_BTHK": a_BTHK, "b_BTHK": b_BTHK}
    return dispatch.run(DIAGONAL_PLUS_LOW_RANK, implementation, **call)


DIAGONAL_PLUS_LOW_RANK = dispatch.Operator(
    diagonal_plus_low_rank, DIAGONAL_PLUS_LOW_RANK_IMPLEMENTATIONS, DIAGONAL_PLUS_LOW_RANK_CASE
)


def step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    beta_BH: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, for decoding, in constant time and memory.

    Args:
      q_BHK: (B, G, K), floating; G divides H.
      k_BHK: (B, G, K).
      v_BHV: (B, H, V).
      beta_BH: (B, H).
      log_decay: None, (H,), (B, H) or (B, H, K), <= 0.
      scale: multiplies q; None is K**-0.5.
      state: (B, H, K, V), as `delta_rule` and `step` return it; None is zero.

    Returns:
      o_BHV in v's dtype, and the next state, in float32 or wider.

    Raises:
      ValueError: shapes or dtypes that do not fit, named as for `delta_rule` with T = 1.
    """
    arrays = {"q": q_BHK, "k": k_BHK, "v": v_BHV, "beta": beta_BH}
    return arguments.step(delta_rule, "delta_rule.step", log_decay, scale, state, **arrays)


def step_diagonal_plus_low_rank(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    a_BHK: jax.Array,
    b_BHK: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `diagonal_plus_low_rank`, for decoding, in constant time and memory.

    Arguments and results are those of `step`, but for a_BHK and b_BHK, both (B, H, K), which stand
    in the place of beta_BH.
    """
    arrays = {"q": q_BHK, "k": k_BHK, "v": v_BHV, "a": a_BHK, "b": b_BHK}
    name = "diagonal_plus_low_rank.step"
    return arguments.step(diagonal_plus_low_rank, name, log_decay, scale, state, **arrays)
