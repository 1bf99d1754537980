"""The operators of `kernels_pallas`, and other functions along time, on the mesh in scope.

Names and signatures are those of `kernels_pallas`, and without a mesh so are the functions. Inside
`sharding.scope` an operator runs under `jax.shard_map` on each device's rows, time and heads, since
the compiler cannot partition a kernel, and would gather a sequence to scan it. Where time is split,
states pass along it by `sharding.Options.collective` (`kernels_pallas.context_parallel`). An axis
whose size the mesh axes do not divide, such as one row or one token in decoding, stays whole on
every device; heads must divide.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

import kernels_pallas
from kernels_pallas import context_parallel
from kernels_pallas.context_parallel import collectives
from seqmodels import sharding
from seqmodels.array_typing import Array


def on_parts(function: Callable, arrays: dict[str, tuple[Any, str]], results: Any) -> Any:
    """Calls function(axis_name, **arrays) on each device's part of the arrays; returns its results.

    axis_name is the mesh axis that splits time, or None. Without a mesh the function is called once
    on the whole arrays, with axis_name None.

    arrays: {name: (array or None, letters)} with a letter for each axis, as in `sharding.axes_of`:
      those such as B, T, H (heads) and D (channels of heads) are split, others are not. Axes with
      one letter have one size.
    results: a pytree of strings, the letters of each array that the function returns. A result
      without T is the same on all parts of time.
    """
    values = {name: value for name, (value, _) in arrays.items()}
    axes = _axes(arrays)
    if axes is None:
        return function(None, **values)

    def spec(letters):
        return PartitionSpec(*(axes.get(letter) for letter in letters))

    local = functools.partial(function, axes.get("T"))
    return jax.shard_map(
        lambda values: local(**values),
        in_specs=({name: spec(letters) for name, (_, letters) in arrays.items()},),
        out_specs=jax.tree.map(spec, results),
        check_vma=False,
    )(values)


def _axes(arrays) -> dict[str, Any] | None:
    """Returns {letter: mesh axes that split it} for the arrays of `on_parts`, None without a mesh.

    Raises ValueError for heads or channels that the mesh axis does not divide.
    """
    if not sharding.sizes():
        return None
    lengths = {}
    for value, letters in arrays.values():
        if value is not None:
            lengths |= zip(letters, value.shape)
    axes = {letter: sharding.axes_of(letter, length) for letter, length in lengths.items()}
    for letter, what in (("H", "heads"), ("D", "channels")):
        if letter in lengths:
            _split_heads(lengths[letter], what)
    single = {letter: names[0] for letter, names in axes.items() if len(names) == 1}
    return {letter: names for letter, names in axes.items() if names} | single


def _split_heads(heads: int, what: str = "heads") -> int:
    """Returns the number of heads per device; raises ValueError if it is not whole."""
    ways = sharding.sizes().get(sharding.HEAD_AXIS, 1)
    if heads % ways:
        raise ValueError(
            f"{heads} {what} cannot be split over mesh axis {sharding.HEAD_AXIS!r}: "
            f"{heads} is not divisible by {ways}"
        )
    return heads // ways


def _operator(
    plain: Callable, split: Callable, arrays, results, *, choices=sharding.COLLECTIVES, **keywords
):
    """Returns an operator's results on the mesh in scope.

    plain, split: the operator of `kernels_pallas`, and of `context_parallel` for where time is
      split. arrays, results: arrays with their letters, and letters of the results, as in
      `on_parts`. choices: the collectives that `split` takes; () where it takes none.
    """

    def local(axis_name, **values):
        if axis_name is None:
            return plain(**values, **keywords)
        how = {"axis_name": axis_name}
        if choices:
            collective = sharding.options().collective
            how["collective"] = collective if collective in choices else choices[0]
        return split(**values, **keywords, **how)

    return on_parts(local, arrays, results)


def _log_decay(log_decay: Array | None) -> tuple[Array | None, str]:
    """Returns a log decay and the letters of its axes: H, BTH or BTHK."""
    if log_decay is None:
        return None, ""
    return log_decay, "H" if log_decay.ndim == 1 else "BTHK"[: log_decay.ndim]


def _key_heads(x_BTGK: Array, v_BTHV: Array) -> Array:
    """Repeats key heads that value heads share as often as it takes to split them over devices."""
    G, H = x_BTGK.shape[2], v_BTHV.shape[2]
    ways = math.lcm(G, sharding.sizes().get(sharding.HEAD_AXIS, 1))
    if ways > G and H % ways == 0:
        x_BTGK = jnp.repeat(x_BTGK, ways // G, axis=2)
    return x_BTGK


def _matrix_recurrence(
    plain: Callable,
    split: Callable,
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    others: dict[str, tuple[Array, str]],
    log_decay: Array | None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    **keywords,
) -> tuple[Array, Array]:
    """Returns (o_BTHV, final_BHKV) of an operator with a matrix state, on the mesh in scope.

    plain, split: the operator of `kernels_pallas`, and of `context_parallel` for where time is
      split. others: its arrays besides q, k, v and log_decay, by name and with their letters.
    """
    arrays = {
        "q_BTHK": (_key_heads(q_BTHK, v_BTHV), "BTGK"),
        "k_BTHK": (_key_heads(k_BTHK, v_BTHV), "BTGK"),
        "v_BTHV": (v_BTHV, "BTHV"),
        **others,
        **({} if log_decay is None else {"log_decay": _log_decay(log_decay)}),
        "initial_state": (initial_state, "BHKV"),
        "segment_ids": (segment_ids, "BT"),
    }
    return _operator(plain, split, arrays, ("BTHV", "BHKV"), **keywords)


def linear_attention(
    q_BTHK: Array, k_BTHK: Array, v_BTHV: Array, log_decay: Array | None = None, **keywords
) -> tuple[Array, Array]:
    """Computes `kernels_pallas.linear_attention`, with its keywords, on the mesh in scope."""
    plain, split = kernels_pallas.linear_attention, context_parallel.linear_attention
    return _matrix_recurrence(plain, split, q_BTHK, k_BTHK, v_BTHV, {}, log_decay, **keywords)


def document_sums(q_BTHK: Array, k_BTHK: Array, v_BTHV: Array, **keywords) -> tuple[Array, Array]:
    """Computes `kernels_pallas.document_sums`, with its keywords, on the mesh in scope."""
    plain, split = kernels_pallas.document_sums, context_parallel.document_sums
    return _matrix_recurrence(plain, split, q_BTHK, k_BTHK, v_BTHV, {}, None, **keywords)


def document_totals(x_BTHV: Array, segment_ids_BT: Array | None = None, **keywords) -> Array:
    """Returns the sum of x over each token's document, at each of its tokens, (B, T, H, V).

    Sums are float32 or wider, whatever x's dtype. Keywords: block_size of `document_sums`, for sums
    over the tokens of a token's own block and of earlier ones. Heads that the mesh axis does not
    divide, such as one head of counts, stay whole on every device.
    """
    x_BTHV = x_BTHV.astype(jnp.promote_types(x_BTHV.dtype, jnp.float32))
    one_BTH1 = jnp.ones_like(x_BTHV[..., :1])
    heads = "N" if x_BTHV.shape[2] % sharding.sizes().get(sharding.HEAD_AXIS, 1) else "H"
    arrays = {
        "q_BTHK": (one_BTH1, f"BT{heads}K"),
        "k_BTHK": (one_BTH1, f"BT{heads}K"),
        "v_BTHV": (x_BTHV, f"BT{heads}V"),
        "segment_ids": (segment_ids_BT, "BT"),
    }
    plain, split = kernels_pallas.document_sums, context_parallel.document_sums
    results = f"BT{heads}V", f"B{heads}KV"
    return _operator(plain, split, arrays, results, scale=1.0, **keywords)[0]


def delta_rule(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    beta_BTH: Array,
    log_decay: Array | None = None,
    **keywords,
) -> tuple[Array, Array]:
    """Computes `kernels_pallas.delta_rule`, with its keywords, on the mesh in scope."""
    plain, split = kernels_pallas.delta_rule, context_parallel.delta_rule
    others = {"beta_BTH": (beta_BTH, "BTH")}
    return _matrix_recurrence(plain, split, q_BTHK, k_BTHK, v_BTHV, others, log_decay, **keywords)


def diagonal_plus_low_rank(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    a_BTHK: Array,
    b_BTHK: Array,
    log_decay: Array | None = None,
    **keywords,
) -> tuple[Array, Array]:
    """Computes `kernels_pallas.diagonal_plus_low_rank`, with its keywords, on the mesh in scope."""
    plain, split = kernels_pallas.diagonal_plus_low_rank, context_parallel.diagonal_plus_low_rank
    others = {"a_BTHK": (a_BTHK, "BTHK"), "b_BTHK": (b_BTHK, "BTHK")}
    return _matrix_recurrence(plain, split, q_BTHK, k_BTHK, v_BTHV, others, log_decay, **keywords)


def diagonal_scan(
    x_BTD: Array,
    decay_BTD: Array | None = None,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    **keywords,
) -> tuple[Array, Array]:
    """Computes `kernels_pallas.diagonal_scan` on the mesh in scope.

    Further keywords: reverse, implementation.
    """

    def letters(decay):
        return "D" if decay is not None and decay.ndim == 1 else "BTD"

    arrays = {
        "x_BTD": (x_BTD, "BTD"),
        "decay_BTD": (decay_BTD, letters(decay_BTD)),
        "log_decay": (log_decay, letters(log_decay)),
        "initial_state": (initial_state, "BD"),
        "segment_ids": (segment_ids, "BT"),
    }
    plain, split = kernels_pallas.diagonal_scan, context_parallel.diagonal_scan
    return _operator(plain, split, arrays, ("BTD", "BD"), **keywords)


def causal_conv(
    x_BTD: Array,
    w: Array,
    *,
    bias: Array | None = None,
    l2_norm_heads: int | None = None,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
    **keywords,
) -> tuple[Array, Array]:
    """Computes `kernels_pallas.causal_conv` on the mesh in scope.

    Further keywords: activation, eps, implementation.
    """
    arrays = {
        "x_BTD": (x_BTD, "BTD"),
        "w": (w, "ID"),
        "bias": (bias, "D"),
        "initial_state": (initial_state, "BID"),
        "segment_ids": (segment_ids, "BT"),
    }
    if l2_norm_heads is not None:  # each device has whole heads
        l2_norm_heads = _split_heads(l2_norm_heads)
    plain, split = kernels_pallas.causal_conv, context_parallel.causal_conv
    keywords["l2_norm_heads"] = l2_norm_heads
    return _operator(plain, split, arrays, ("BTD", "BID"), choices=(), **keywords)


def softmax_attention(
    q_BTHK: Array,
    k_BTGK: Array,
    v_BTGV: Array,
    *,
    segment_ids: Array | None = None,
    kv_segment_ids_BS: Array | None = None,
    q_positions_BT: Array | None = None,
    kv_positions_BS: Array | None = None,
    **keywords,
) -> Array:
    """Computes `kernels_pallas.softmax_attention` on the mesh in scope.

    Where positions or key ids are given, keys are slots of a decoding cache, and time is not split.
    Further keywords: window, causal, scale, implementation.
    """
    cache = {
        "kv_segment_ids_BS": (kv_segment_ids_BS, "BS"),
        "q_positions_BT": (q_positions_BT, "BQ"),
        "kv_positions_BS": (kv_positions_BS, "BS"),
    }
    by_index = not any(value is not None for value, _ in cache.values())
    time, slots = ("T", "T") if by_index and q_BTHK.shape[1] == k_BTGK.shape[1] else ("Q", "S")
    arrays = {
        "q_BTHK": (q_BTHK, f"B{time}HK"),
        "k_BTGK": (_key_heads(k_BTGK, q_BTHK), f"B{slots}GK"),
        "v_BTGV": (_key_heads(v_BTGV, q_BTHK), f"B{slots}GV"),
        "segment_ids": (segment_ids, f"B{time}"),
    }
    return _operator(
        kernels_pallas.softmax_attention,
        context_parallel.softmax_attention,
        arrays if by_index else arrays | cache,
        f"B{time}HV",
        choices=("all_gather", "ring"),
        **keywords,
    )


def associative_scan(compose: Callable, elements: Any, letters: str) -> Any:
    """Returns for each token the composition of all elements up to its own, on the mesh in scope.

    This is `lax.associative_scan` over time (axis 1).

    compose: (first, then) -> both, associative, on pytrees like `elements`; it broadcasts.
    elements: a pytree of arrays (B, T, ...). letters: of their axes, as in `on_parts`.
    """
    leaves, structure = jax.tree.flatten(elements)

    def local(axis_name, **leaves):
        elements = jax.tree.unflatten(structure, [leaves[name] for name in arrays])
        if axis_name is None:
            return lax.associative_scan(compose, elements, axis=1)
        return context_parallel.associative_scan(compose, elements, axis_name=axis_name)

    arrays = {f"leaf_{i}": (leaf, letters) for i, leaf in enumerate(leaves)}
    return on_parts(local, arrays, jax.tree.unflatten(structure, [letters] * len(leaves)))


def previous(x_BT: Array, first_B: Array | None = None, letters: str = "BT") -> Array:
    """Returns y_t = x_{t-1}, x shifted by one token; a row's first token gets first_B.

    first_B None repeats the row's first x. letters: of x's axes, as in `on_parts`.
    """

    def local(axis_name, x_BT, first_B):
        first_B1 = x_BT[:, :1] if first_B is None else first_B[:, None]
        if axis_name is None:
            return jnp.concatenate([first_B1, x_BT[:, :-1]], axis=1)
        return context_parallel.shift(x_BT, initial_state=first_B1, axis_name=axis_name)

    arrays = {"x_BT": (x_BT, letters), "first_B": (first_B, letters.replace("T", ""))}
    return on_parts(local, arrays, letters)


def starts(segment_ids_BT: Array) -> Array:
    """Returns (B, T) booleans: whether a token, not the row's first, begins a new document."""
    return segment_ids_BT != previous(segment_ids_BT)


def run_index(segment_ids_BT: Array) -> Array:
    """Returns each token's document number in its row, (B, T) int32, counted from 0."""
    return associative_scan(jnp.add, starts(segment_ids_BT).astype(jnp.int32), "BT")


def positions(segment_ids_BT: Array) -> Array:
    """Returns each token's index within its document, (B, T) int32, counted from 0."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    start_index_BT = jnp.where(starts(segment_ids_BT), index_T[None], 0)
    return index_T[None] - associative_scan(jnp.maximum, start_index_BT, "BT")


def entering_state(axis_name, state, decay, initial) -> tuple[Array, Array]:
    """Returns the state that enters this device's shard of time, and the sequence's final state.

    For use inside `on_parts`, by recurrences whose shard maps an entering state S to decay * S +
    state, element by element.

    state, decay: the shard's final state from a zero state, and its total decay, (B, ..., V).
    initial: the state before the whole sequence.
    """
    collective, columns = sharding.options().collective, state.shape[-1]
    form = collectives.form("entering_state", axis_name, collective, None, columns)
    return collectives.entering_state(form, state, decay, initial=initial)


def with_earlier(axis_name, old_BS, x_BT) -> Array:
    """Returns x_BT with the S tokens before this device's shard of time prepended, (B, S + T, ...).

    For use inside `on_parts`. old_BS: the S tokens before the whole sequence.
    """
    if axis_name is not None:
        ranks, S = collectives.Ranks(axis_name), old_BS.shape[1]
        old_BS = collectives.preceding_tokens(ranks, x_BT, S, old_BS)
    return jnp.concatenate([old_BS, x_BT], axis=1)


def embedding(table_WD: Array, tokens_BT: Array) -> Array:
    """Returns the tokens' rows of an embedding table, (B, T, D).

    Where the vocabulary is split over devices, each looks up its own rows, and a sum joins them.
    """
    words = sharding.axes_of("W", table_WD.shape[0])

    def local(_, table_WE, tokens_BT):
        if not words:
            return jnp.take(table_WE, tokens_BT, axis=0)
        W = table_WE.shape[0]
        row_BT = tokens_BT - W * lax.axis_index(words)
        here_BT = (row_BT >= 0) & (row_BT < W)
        x_BTE = jnp.take(table_WE, jnp.where(here_BT, row_BT, 0), axis=0)
        return lax.psum(jnp.where(here_BT[..., None], x_BTE, 0), words)

    arrays = {"table_WE": (table_WD, "WE"), "tokens_BT": (tokens_BT, "BT")}
    return on_parts(local, arrays, "BTE")


def linear_cross_entropy(
    x_BTD: Array, matrix: Array, labels_BT: Array, *, layout: str = "WD", **keywords
) -> tuple[Array, kernels_pallas.TokenDetails]:
    """Computes `kernels_pallas.linear_cross_entropy` on the mesh in scope: (loss_BT, TokenDetails).

    Tokens and the vocabulary are split over devices; logits are not gathered. layout says whether
    the output matrix is "WD" or "DW".
    """
    time = "t" if sharding.axes_of("t", x_BTD.shape[1]) else "T"
    arrays = {
        "x_BTD": (x_BTD, f"B{time}E"),
        "matrix": (matrix, layout.replace("D", "E")),
        "labels_BT": (labels_BT, f"B{time}"),
    }
    words = sharding.axes_of("W", matrix.shape[layout.index("W")])

    def local(_, **arrays):
        return kernels_pallas.linear_cross_entropy(
            **arrays,
            layout=layout,
            words_axis=words[0] if words else None,
            details=True,
            **keywords,
        )

    token = f"B{time}"
    details = kernels_pallas.TokenDetails._make([token] * len(kernels_pallas.TokenDetails._fields))
    return on_parts(local, arrays, (token, details))
