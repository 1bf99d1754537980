"""Softmax attention, full or windowed, for baselines and hybrids: the public function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from kernels_pallas.common import arguments, chunk_blocks, dtypes, segments
from kernels_pallas.dispatch import explicit_axes, manual_axes
from kernels_pallas.ops.softmax_attention import chunked, library, reference
from kernels_pallas.ops.softmax_attention.case import CASE
from kernels_pallas.ops.softmax_attention.finite import isolated
from kernels_pallas.ops.softmax_attention.visibility import Visibility

# Up to here all logits at once are as fast on a CPU as blocks, and simpler to fuse elsewhere.
FEW_LOGITS = 128 * 128


def _few_logits(*, q, v, visibility):
    T, S = q.shape[1], v.shape[1]
    if chunk_blocks.known(T, S) and T * S <= FEW_LOGITS:
        return f"for {T} x {S} logits it is no faster than 'xla'"
    return None


IMPLEMENTATIONS = (
    dispatch.Implementation("splash", library.splash, library.splash_unsupported_reason, "tpu"),
    dispatch.Implementation("cudnn", library.cudnn, library.cudnn_unsupported_reason, "gpu"),
    dispatch.Implementation("chunked", isolated(chunked.run), passed_over_reason=_few_logits),
    dispatch.Implementation("xla", isolated(library.xla)),
    dispatch.Implementation("reference", isolated(reference.naive, one_query=True)),
)


@explicit_axes.automatic("BTHV", q_BTHK="BTHK", v_BTGV="BSGV")
def softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    *,
    window: int | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes softmax attention, full or within a window (arXiv 1706.03762, eq. 1):

        o_t = sum_s p_ts v_s,    p_t = softmax over the s that t may see of scale * q_t . k_s

    Training, prefill and decoding from a cache are this one call. In training token t is at index t
    of q, k and v. Given positions instead, keys are slots of a cache of any length S in any order:
    t sees slot s iff the slot is filled (kv_position >= 0), not later (causal), and inside the
    window. A query that sees nothing gives 0, and gets and passes no gradient. NaN and Inf reach
    only the tokens that see them, in gradients too. Exceptions, where a hidden value counts as 0
    times itself: 'cudnn', 'splash' and, with one query (decoding), 'xla' and 'chunked'.

    Args:
      q_BTHK: (B, T, H, K), floating.
      k_BTGK, v_BTGV: (B, S, G, K) and (B, S, G, V), of q's dtype. G divides H: key head g serves
        the query heads from g H/G to (g+1) H/G - 1 (grouped queries, arXiv 2305.13245; G = 1 is
        multi-query, 1911.02150). S = T unless positions are given or causal is False.
      window: a token sees itself and the window-1 tokens before it (causal=False: also after it);
        None sees all.
      causal: whether later tokens are hidden.
      segment_ids: int (B, T). A document is a run of equal ids, and sees only itself.
      kv_segment_ids_BS: int (B, S), where keys are not the queries' own tokens: then ids are
        compared as they are.
      q_positions_BT, kv_positions_BS: int (B, T) and (B, S), both or neither; -1 is an empty slot.
      scale: None is K**-0.5.
      implementation: 'reference' (float32, every logit), 'xla' (jax.nn.dot_product_attention),
        'chunked' (blocks, memory O(T), a window costs O(T * window)), 'cudnn' (GPUs: bfloat16, by
        index, no segments), 'splash' (TPUs: by index), or None: splash or cuDNN where they can,
        else 'xla' for few logits, else 'chunked'.

    Returns:
      o_BTHV in q's dtype; softmax statistics are float32 or wider.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      NotImplementedError: the named implementation cannot run this call here.
    """
    _check(q_BTHK, k_BTGK, v_BTGV, window, causal)
    arguments.check_scale("softmax_attention", scale)
    visibility = _visibility(
        q_BTHK.shape[:2],
        k_BTGK.shape[1],
        (segment_ids, kv_segment_ids_BS),
        (q_positions_BT, kv_positions_BS),
        causal,
        window,
    )
    if 0 in (*q_BTHK.shape[:3], *v_BTGV.shape):  # no queries, or no keys
        return jnp.zeros_like(q_BTHK, shape=(*q_BTHK.shape[:3], v_BTGV.shape[3]))
    if q_BTHK.shape[3] == 0:  # all logits are 0, as those of one channel of zeros
        q_BTHK, k_BTGK = (jnp.pad(z, ((0, 0),) * 3 + ((0, 1),)) for z in (q_BTHK, k_BTGK))
    chosen = dispatch.choose(OPERATOR, implementation, q=q_BTHK, v=v_BTGV, visibility=visibility)
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
    k_BTGK, v_BTGV = k_BTGK.astype(q_BTHK.dtype), v_BTGV.astype(q_BTHK.dtype)
    return chosen.call(*manual_axes.alike((q_BTHK, k_BTGK, v_BTGV, visibility)), scale)


OPERATOR = dispatch.Operator(softmax_attention, IMPLEMENTATIONS, CASE)


def step(
    q_BHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    *,
    q_position_B: jax.Array,
    kv_positions_BS: jax.Array,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """One token of `softmax_attention`, against a cache that already holds its own key and value.

    Args:
      q_BHK: (B, H, K), floating.
      k_BSGK, v_BSGV: (B, S, G, K) and (B, S, G, V), the slots of the cache.
      q_position_B: int (B,), the token's position.
      kv_positions_BS: int (B, S), the positions of the slots' tokens; -1 is an empty slot.
      window, scale: as for `softmax_attention`.

    Returns:
      o_BHV in q's dtype.

    Raises:
      ValueError: shapes that do not fit.
    """
    name = "softmax_attention.step"
    (q_BTHK,) = arguments.one_token(name, q=q_BHK)
    arguments.check_shape(name, "q_position", q_position_B, q_BHK.shape[:1])
    return softmax_attention(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        q_positions_BT=q_position_B[:, None],
        kv_positions_BS=kv_positions_BS,
        window=window,
        scale=scale,
    )[:, 0]


def _check(q_BTHK, k_BSGK, v_BSGV, window, causal) -> None:
    operator = "softmax_attention"
    for name, array in (("q", q_BTHK), ("k", k_BSGK), ("v", v_BSGV)):
        arguments.check_float(operator, name, array)
    shapes = f"q {q_BTHK.shape}, k {k_BSGK.shape}, v {v_BSGV.shape}"
    if not q_BTHK.ndim == k_BSGK.ndim == v_BSGV.ndim == 4:
        raise ValueError(f"{operator}: q, k and v must be (B, time, heads, dim); got {shapes}")
    if not q_BTHK.shape[0] == k_BSGK.shape[0] == v_BSGV.shape[0]:
        raise ValueError(f"{operator}: q, k and v must share the batch B; got {shapes}")
    if k_BSGK.shape[1:3] != v_BSGV.shape[1:3]:
        raise ValueError(f"{operator}: k and v must share time and heads; got {shapes}")
    if q_BTHK.shape[3] != k_BSGK.shape[3]:
        raise ValueError(f"{operator}: q and k must share their last dimension K; got {shapes}")
    if not arguments.divides(k_BSGK.shape[2], q_BTHK.shape[2]):
        raise ValueError(f"{operator}: k's heads must divide q's; got {shapes}")
    expected = "an integer of at least 1 (the token itself), or None"
    arguments.check_count(operator, "window", window, expected)
    arguments.check_flag(operator, "causal", causal)


def _signed(x) -> Any:
    """Returns integer arrays as int32 or wider: differences of positions may be negative."""
    if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.integer):
        return x
    return jnp.asarray(x).astype(dtypes.common(x.dtype, jnp.int32))


def _visibility(batch_and_time, S, segment_ids, positions, causal, window) -> Visibility:
    operator = "softmax_attention"
    B, T = batch_and_time
    q_segment_BT, kv_segment_BS = (_signed(x) for x in segment_ids)
    q_position_BT, kv_position_BS = (_signed(x) for x in positions)
    if (q_position_BT is None) != (kv_position_BS is None):
        raise ValueError(f"{operator}: give both q_positions_BT and kv_positions_BS, or neither")
    if q_segment_BT is None and kv_segment_BS is not None:
        raise ValueError(f"{operator}: kv_segment_ids_BS needs segment_ids beside it")
    for name, array, length in (
        ("segment_ids", q_segment_BT, T),
        ("kv_segment_ids_BS", kv_segment_BS, S),
        ("q_positions_BT", q_position_BT, T),
        ("kv_positions_BS", kv_position_BS, S),
    ):
        if array is not None:
            arguments.check_shape(operator, name, array, (B, length))
            arguments.check_integers(operator, name, array)
    by_index = q_position_BT is None
    if by_index:
        if S != T and (causal or window is not None):
            raise ValueError(
                f"{operator}: {T} queries and {S} keys: with causal or a window, say where they "
                "are by q_positions_BT and kv_positions_BS"
            )
        q_position_BT = jnp.arange(T, dtype=jnp.int32)[None]
        kv_position_BS = jnp.arange(S, dtype=jnp.int32)[None]
    # A window that holds all tokens is none: its sum with an index or a position might overflow.
    if window is not None and window >= (2**30 if by_index else 2**31 - 1):
        window = None
    if q_segment_BT is not None and kv_segment_BS is None:
        if S != T:
            raise ValueError(
                f"{operator}: {T} queries and {S} keys: segment_ids needs kv_segment_ids_BS beside "
                "it"
            )
        q_segment_BT = kv_segment_BS = segments.run_index(q_segment_BT)
    return Visibility(
        q_position_BT,
        kv_position_BS,
        q_segment_BT,
        kv_segment_BS,
        causal=causal,
        window=window,
        aligned=by_index and S == T,
        by_index=by_index,
    )
