"""The operators over a mesh axis that time is split over: each rank holds one stretch of every
sequence.

Inside `jax.shard_map`, arrays are this rank's stretch, and ranks follow each other in the order of
`lax.axis_index`:

    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    time = PartitionSpec(None, "seq")
    attend = functools.partial(sequence_parallel.linear_attention, axis_name="seq")
    o_BTHV, final_BHKV = jax.shard_map(
        attend, mesh=mesh, in_specs=time, out_specs=(time, PartitionSpec())
    )(q_BTHK, k_BTHK, v_BTHV)

with `check_vma`, jax.shard_map's default, or without it.

Signatures are those of `kernels_pallas`, and so are results and all gradients, to rounding. Beside
them:

  axis_name      the mesh axis, or a tuple of axes: ranks then follow each other with
                 the last one fastest.
  collective       how states travel: 'all_gather', 'all_scan', 'ring' (see `collectives`); softmax
    attention has its own.
  blocks         of 'all_scan', how many blocks of columns a state is passed on in; None is the
    largest divisor of their
                 number up to 8.
  initial_state  is the state before the whole sequence, the same on all ranks; the final state is
                 that behind the whole sequence, the same on all ranks, from one all-reduce that is
                 left out where it is not used.
  segment_ids    this rank's; documents may span any number of ranks.

Under `jax.checkpoint` the backward pass would repeat an collective. A policy that saves what has the
name `kept.EXCHANGED` keeps the states that entered, and sends them once; `kept.NAME` does so with a
ring's output. Gathered keys, of which there are W times as many, are gathered again.

All ranks have stretches of one length, any length. Operators run through the public functions, so
that every implementation serves. A stretch's document borders and its ranks' are handled here;
nothing else crosses from one rank to another. Every function raises ValueError, before anything is
compiled, for an unknown collective, an axis that is not mapped, or blocks that do not divide, and
what the plain operator raises (NotImplementedError, too, for an implementation that cannot run).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from kernels_pallas.common import arguments, checks, dtypes, segments
from kernels_pallas.context_parallel import collectives, ring_attention, shard_maps
from kernels_pallas.dispatch import manual_axes
from kernels_pallas.ops.causal_conv import reference as conv_reference


def linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    blocks: int | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.linear_attention` with time split over `axis_name`.

    What a stretch leaves, L = sum_t (k_t decayed to its end) v_t^T, is one matrix product, made
    first. The operator starts from no state, so that it needs nothing of the collective of L and both
    can run at once; what entered is added behind them, o_t += (q_t decayed from the start) S. The
    backward pass is the same: the cotangent of S is one matrix product of q and o's cotangent, and
    the operator's own backward pass needs nothing of its collective. Nothing runs over the sequence
    twice; what one device would not have is 2 T K V multiply-adds a head forward and 4 backward (5
    with a decay a head).

    Received by a rank, forward, in numbers of 4 bytes: all_gather (W-1) B H (K V + X), X the width
    of the decay (K a channel, 1 a head) and 8 more a row for segment ids; all_scan and ring B H K V
    and 4 more a row and block for ids. Backward the same without ids.

    In bfloat16 the output is rounded once more than on one device.
    """
    name = "linear_attention"
    arguments.check_qkv(name, q_BTHK, k_BTHK, v_BTHV)
    arguments.check_segment_ids(name, segment_ids, v_BTHV)
    form = _form(name, axis_name, collective, blocks, v_BTHV.shape[-1])
    q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids = manual_axes.alike(
        (q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids), axis_name
    )
    log_decay_BTHX = arguments.normal_log_decay(name, log_decay, q_BTHK, v_BTHV)
    entered_BHKV = arguments.normal_initial_state(name, initial_state, q_BTHK, v_BTHV)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), form.ranks.of_last(entered_BHKV)
    run_BT, first_B, last_B = shard_maps.documents(segment_ids)
    # Checkpoints: what they hold is made again from inputs that are kept in any case.
    local_BHKV, decay_BHX1 = jax.checkpoint(shard_maps.written)(
        k_BTHK, v_BTHV, log_decay_BTHX, run_BT
    )
    state_BHKV, final_BHKV = collectives.entering(
        form, local_BHKV, decay_BHX1, first_B, last_B, initial_state
    )
    o_BTHV, _ = kernels_pallas.linear_attention(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay,
        scale=scale,
        initial_state=jnp.zeros_like(state_BHKV),
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    read_BTHV = jax.checkpoint(shard_maps.read)(q_BTHK, state_BHKV, log_decay_BTHX, run_BT)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    o_BTHV = (o_BTHV.astype(read_BTHV.dtype) + scale * read_BTHV).astype(o_BTHV.dtype)
    return o_BTHV, final_BHKV.astype(entered_BHKV.dtype)


def delta_rule(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    beta_BTH: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    blocks: int | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.delta_rule` with time split over `axis_name`.

    What a stretch makes of the state that enters is now a matrix M (K, K) a head. The operator is
    linear in v and in its initial state together, so one run of it with K columns more, values [v,
    0] from the state [0, I], gives [o, O] and [L, M]: the output without what entered, what o would
    read of it, and the map E = M S + L. Then o_t += O_t S. Nothing is computed twice; what one
    device would not have is those K columns beside V in everything that has a width of V (the
    inverse in a chunk does not), 2 T K V multiply-adds for O S, and W K K V for composing the maps,
    in float32 at the highest precision. The collective follows the operator, and backward stands
    before it.

    Received by a rank, forward and backward alike, in numbers of 4 bytes: all_gather (W-1) B H (K V
    + K K), and forward 8 more a row for segment ids; all_scan and ring B H K V, for M stays at
    home.

    In bfloat16 the output is rounded once more than on one device.
    """
    inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, initial_state, segment_ids
    keywords = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    return _by_map(kernels_pallas.delta_rule, inputs, (axis_name, collective, blocks), keywords)


def diagonal_plus_low_rank(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    a_BTHK: jax.Array,
    b_BTHK: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    blocks: int | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.diagonal_plus_low_rank` with time split over `axis_name`: as `delta_rule`
    here, with its costs."""
    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, initial_state, segment_ids
    keywords = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    operator = kernels_pallas.diagonal_plus_low_rank
    return _by_map(operator, inputs, (axis_name, collective, blocks), keywords)


def diagonal_scan(
    x_BTD: jax.Array,
    decay_BTD: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    blocks: int | None = None,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.diagonal_scan` with time split over `axis_name`.

    The map of a stretch, h -> A h + b, is reduced from its tokens' maps first (x and the decay are
    read, nothing is written over time), then exchanged; the operator runs once, from the state that
    really enters. Backward, what h's cotangent alone gives that state is reduced and exchanged in
    the same way, and the operator's own backward pass runs once, with the true cotangents at both
    ends. The state has no K: it is T times smaller than the sequence, so its collective is a matter
    of latency, and hiding it behind a run without the state would cost more, a second pass to add
    what the state contributes.

    Received by a rank, forward and backward alike, in numbers of 4 bytes (8 if complex): all_gather
    2 (W-1) B D, forward 8 more a row for segment ids; all_scan and ring B D.
    """
    name = "diagonal_scan"
    arguments.check_array(name, "x", x_BTD)
    form = _form(name, axis_name, collective, blocks, x_BTD.shape[-1], reverse=reverse)
    x_BTD, decay_BTD, log_decay, initial_state, segment_ids = manual_axes.alike(
        (x_BTD, decay_BTD, log_decay, initial_state, segment_ids), axis_name
    )
    output, final_BD = _as_on_one_device(
        functools.partial(kernels_pallas.diagonal_scan, reverse=reverse),
        x_BTD,
        decay_BTD,
        log_decay=log_decay,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    decay = decay_BTD
    if log_decay is not None:
        checks.not_positive(name, "log_decay", jnp.real(log_decay))
        decay = jnp.exp(log_decay.astype(dtypes.common(log_decay.dtype, jnp.float32)))
    decay = decay.astype(final_BD.dtype)
    decay_BTD = decay if decay.ndim == 3 else jnp.broadcast_to(decay[None, None], x_BTD.shape)
    if initial_state is None:
        initial_state = jnp.zeros_like(x_BTD, shape=final_BD.shape)
    if arguments.nothing(x_BTD):
        final = form.ranks.of_last(initial_state.astype(final_BD.dtype))
        return jnp.zeros_like(x_BTD, output.dtype), final
    ends = None, None
    if segment_ids is not None:
        start_BT = segments.starts(segment_ids, reverse=reverse)
        decay_BTD = jnp.where(start_BT[..., None], 0, decay_BTD)
        ends = segment_ids[:, 0], segment_ids[:, -1]
    call = shard_maps.ScanCall(form, reverse, implementation)
    h_BTD, leaving_BD = shard_maps.scan(
        call,
        x_BTD,
        decay_BTD,
        initial_state.astype(final_BD.dtype),
        ends[::-1] if reverse else ends,
    )
    return h_BTD, form.ranks.of_last(leaving_BD)


def softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    collective: str = "all_gather",
    window: int | None = None,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`kernels_pallas.softmax_attention` with time split over `axis_name`.

    all_gather  every rank receives all keys and values, in one collective, and attends with its own
                queries; backward one reduce-scatter brings their gradients home (LASP-2H, arXiv
                2502.07563, section 3.3). Received a rank: (W-1) B T G (K + V) numbers of k's dtype,
                and 4 more a token for segment ids.
    ring        keys and values go round, and each rank merges what its queries make of them by
                log-sum-exp (ring attention, arXiv 2310.01889); backward they go round again, with
                their gradients, in float32, behind them. The same bytes in W - 1 messages, of which
                one is held at a time. Memory does not grow with W.
    window      given with no positions, whatever `collective` says, only the window-1 tokens before
                the stretch are received (causal=False: and as many behind it), from as many ranks
                as have them: the bytes do not grow with W.

    A causal ring over contiguous stretches would leave the first ranks idle: blocks that nobody
    sees cost nothing. So each rank first trades half of its stretch for the one that balances it
    (zigzag: halves r and 2W-1-r of 2W), and its output back, where T is even and no positions are
    given: two messages a way, and nobody else has to know. A caller whose whole sequence lies in
    another order, such as `zigzag_order`, says so by positions, and gives ids of documents for both
    sides.

    Arguments are those of the plain operator, and this rank's. k and v may be other tokens than q's
    (then with causal=False or with positions), in equal numbers on all ranks. Positions are those
    in the whole sequence. Where kv_segment_ids_BS are given, ids are compared as they are, else a
    document is a run of equal ids. `implementation` serves 'all_gather' and windows; the ring is
    its own ('chunked').
    """
    name = "softmax_attention"
    collectives.check_collective(name, collective, ("all_gather", "ring"))
    ranks = collectives.ranks(name, axis_name)
    inputs = q_BTHK, k_BTGK, v_BTGV, segment_ids, kv_segment_ids_BS, q_positions_BT, kv_positions_BS
    q_BTHK, k_BTGK, v_BTGV, *others = manual_axes.alike(inputs, axis_name)
    names = "segment_ids", "kv_segment_ids_BS", "q_positions_BT", "kv_positions_BS"
    given = dict(zip(names, others))
    attend = functools.partial(
        kernels_pallas.softmax_attention, window=window, causal=causal, scale=scale
    )
    _as_on_one_device(attend, q_BTHK, k_BTGK, v_BTGV, **given)
    k_BTGK, v_BTGV = k_BTGK.astype(q_BTHK.dtype), v_BTGV.astype(q_BTHK.dtype)
    if 0 in (*q_BTHK.shape, *v_BTGV.shape):
        return attend(q_BTHK, k_BTGK, v_BTGV)  # of no positions: what is seen makes no difference
    by_index = q_positions_BT is None and kv_segment_ids_BS is None
    if collective == "ring" and implementation not in (None, "chunked"):
        raise NotImplementedError(
            f"{name}: implementation {implementation!r} cannot run with collective='ring', which is 'chunked' itself"
        )
    if by_index and window is not None and k_BTGK.shape[1] == q_BTHK.shape[1]:
        attend = functools.partial(attend, implementation=implementation)
        return ring_attention.windowed(
            ranks, attend, (q_BTHK, k_BTGK, v_BTGV), given["segment_ids"], window, causal
        )
    if collective == "ring":
        qkv = q_BTHK, k_BTGK, v_BTGV
        return ring_attention.ring(ranks, qkv, given, by_index, window, causal, scale)
    attend = functools.partial(attend, implementation=implementation)
    return ring_attention.gathered(ranks, attend, (q_BTHK, k_BTGK, v_BTGV), given)


def causal_conv(
    x_BTD: jax.Array,
    w: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
    bias: jax.Array | None = None,
    activation: str | None = None,
    l2_norm_heads: int | None = None,
    eps: float = 1e-6,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.causal_conv` with time split over `axis_name`.

    The I-1 tokens before a stretch are received from the rank before, or from several where
    stretches are shorter, with their segment ids: B (I-1) (D + 4) numbers of x's dtype, in one
    message a rank; backward B (I-1) D come back.
    """
    name = "causal_conv"
    ranks = collectives.ranks(name, axis_name)
    x_BTD, w, bias, initial_state, segment_ids = manual_axes.alike(
        (x_BTD, w, bias, initial_state, segment_ids), axis_name
    )
    operator = functools.partial(
        kernels_pallas.causal_conv, activation=activation, l2_norm_heads=l2_norm_heads, eps=eps
    )
    call = {"bias": bias, "initial_state": initial_state, "segment_ids": segment_ids}
    _, tail_like = _as_on_one_device(operator, x_BTD, w, **call)
    x_BTD = conv_reference.promoted(x_BTD, w, bias, initial_state)
    if not arguments.nothing(x_BTD):
        call["initial_state"] = collectives.tokens_before(
            ranks, x_BTD, w.shape[0] - 1, initial_state, segment_ids
        )
    y_BTD, tail = operator(x_BTD, w, **call, implementation=implementation)
    return y_BTD, conv_reference.demoted(ranks.of_last(tail), tail_like.dtype)


def shift(
    x_BTX: jax.Array,
    count: int = 1,
    *,
    axis_name: str | tuple[str, ...],
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """x of `count` tokens earlier: y_t = x_{t-count}, of any dtype and trailing axes.

    initial_state: (B, count, ...), what stands before the whole sequence, oldest first, the same on
      all ranks; None is zeros.
    segment_ids: int (B, T); where token t-count is of another document, y_t is zero.
    """
    arguments.check_array("shift", "x", x_BTX)
    arguments.check_count("shift", "count", count, "an integer of at least 1")
    ranks = collectives.ranks("shift", axis_name)
    x_BTX, initial_state, segment_ids = manual_axes.alike(
        (x_BTX, initial_state, segment_ids), axis_name
    )
    B, T = x_BTX.shape[:2]
    if arguments.nothing(x_BTX):
        return x_BTX
    if initial_state is not None:
        arguments.check_shape("shift", "initial_state", initial_state, (B, count, *x_BTX.shape[2:]))
        if jnp.iscomplexobj(initial_state) and not jnp.iscomplexobj(x_BTX):
            raise ValueError(
                f"shift: initial_state has dtype {initial_state.dtype}, x {x_BTX.dtype}; make x complex, too"
            )
    tokens = collectives.tokens_before(ranks, x_BTX, count, initial_state, segment_ids)
    y_BTX = jnp.concatenate([tokens, x_BTX], axis=1)[:, :T]
    if segment_ids is None:
        return y_BTX
    run_BT = segments.run_index(segment_ids)
    same_BT = run_BT == jnp.pad(run_BT, ((0, 0), (count, 0)))[:, :T]
    same_BTX = same_BT.reshape(B, T, *[1] * (x_BTX.ndim - 2))
    return jnp.where(same_BTX, y_BTX, jnp.zeros_like(y_BTX))


def associative_scan(
    compose: Callable[[Any, Any], Any],
    elements: Any,
    *,
    axis_name: str | tuple[str, ...],
    reverse: bool = False,
) -> Any:
    """`lax.associative_scan` over time (axis 1): what the elements of all tokens up to each one
    compose to.

    For whatever else runs along time: the stabiliser of an mLSTM (m -> max(a + m, b), gates alone),
    positions, counts. Of each rank one element a row is gathered, in one collective; its gradient
    is JAX's own.

    Args:
      compose: (first, then) -> both, associative, on pytrees like `elements`; it broadcasts.
      elements: a pytree of arrays (B, T, ...).
      reverse: from the last token to the first; `compose` then gets the later one first.
    """
    ranks = collectives.ranks("associative_scan", axis_name, reverse)
    for x in jax.tree.leaves(elements):
        arguments.check_array("associative_scan", "an element", x)
    if arguments.nothing(*jax.tree.leaves(elements)):
        return elements
    elements = manual_axes.alike(elements, axis_name)
    composed = jax.lax.associative_scan(compose, elements, axis=1, reverse=reverse)
    leaves, structure = jax.tree.flatten(composed)
    end = [x[:, 0 if reverse else -1] for x in leaves]
    ends_W = collectives.unpack(ranks.gather(collectives.pack(end, lead=1)), end, lead=1)
    ends_W = jax.lax.associative_scan(compose, jax.tree.unflatten(structure, ends_W), axis=0)
    before = jnp.maximum(ranks.index - 1, 0)
    entered = jax.tree.map(
        lambda x_W, x: jnp.broadcast_to(jnp.take(x_W, before, axis=0)[:, None], x.shape),
        ends_W,
        composed,
    )
    return jax.tree.map(
        lambda alone, both: jnp.where(ranks.index == 0, alone, both),
        composed,
        compose(entered, composed),
    )


def zigzag_order(ranks: int, length: int) -> np.ndarray:
    """Which token of a sequence stands where, for ranks that share causal attention evenly: rank r
    has parts r and 2W-1-r of 2W.

    x[:, zigzag_order(W, T)] split over W ranks is the zigzag layout, and the order itself their
    positions; `np.argsort` of it undoes it. For models of softmax attention alone:
    `softmax_attention`'s ring finds the balance by itself, and recurrences need time in order.

    Raises:
      ValueError: the length is not a multiple of 2 W.
    """
    if length % (2 * ranks):
        raise ValueError(
            f"zigzag_order: {length} tokens do not divide into 2 parts for each of {ranks} ranks: use a multiple of {2 * ranks}"
        )
    parts = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([parts[[r, 2 * ranks - 1 - r]].reshape(-1) for r in range(ranks)])


def _by_map(operator, inputs, how, keywords):
    """A recurrence whose stretch maps a state by a matrix. inputs: q, k, v, the operator's own,
    initial_state, segment_ids."""
    name = operator.__name__
    arguments.check_qkv(name, *inputs[:3])
    form = _form(name, *how, columns=inputs[2].shape[-1], matrix=True)
    q_BTHK, k_BTHK, v_BTHV, *others, initial_state, segment_ids = manual_axes.alike(
        inputs, form.ranks.axis_name
    )

    def run(v_BTHX, start_BHKX):
        state = {"initial_state": start_BHKX, "segment_ids": segment_ids}
        return operator(q_BTHK, k_BTHK, v_BTHX, *others, **state, **keywords)

    return shard_maps.by_map(name, form, run, q_BTHK, v_BTHV, initial_state, segment_ids)


def _form(name, axis_name, collective, blocks, columns, *, reverse=False, matrix=False):
    collectives.check_collective(name, collective)
    ranks = collectives.ranks(name, axis_name, reverse)
    blocks = collectives.check_blocks(name, collective, blocks, columns)
    return collectives.Form(collective, ranks, blocks, matrix)


def _as_on_one_device(operator, *arrays, **keywords):
    """Shapes of the plain call's results; raises what it raises."""
    return jax.eval_shape(
        functools.partial(operator, implementation="reference"), *arrays, **keywords
    )
