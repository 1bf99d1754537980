"""The operators with time split over a mesh axis: context parallelism.

Also called sequence parallelism over time. Inside `jax.shard_map` each rank holds one shard of
every sequence, and ranks follow each other in the order of `lax.axis_index`:

    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    time = PartitionSpec(None, "seq")
    attend = functools.partial(context_parallel.linear_attention, axis_name="seq")
    o_BTHV, final_BHKV = jax.shard_map(
        attend, mesh=mesh, in_specs=time, out_specs=(time, PartitionSpec())
    )(q_BTHK, k_BTHK, v_BTHV)

with `check_vma` on or off. Arguments, results, gradients (to rounding), implementations and errors
are those of `kernels_pallas`, but for

  axis_name      the mesh axis, or a tuple of axes, the last of them the fastest.
  collective     how states pass along it: 'all_gather', 'all_scan' or 'ring' (see `collectives`);
                 softmax attention has 'all_gather' and 'ring'.
  blocks         the blocks of columns in which 'all_scan' passes a state on; None is the largest
                 divisor of the columns up to 8.
  initial_state  the state before the whole sequence, the same on all ranks. The final state is that
                 after the whole sequence, on all ranks: one all-reduce, absent where it is unused.
  segment_ids    this rank's; a document may span any number of ranks.

Shards have one length, any length. ValueError is raised before anything is compiled for an unknown
collective, an axis that is not mapped, and blocks that do not divide the state's columns.

Under `jax.checkpoint` the backward pass would send again what the forward pass sent. A policy that
saves the names of `kernels_pallas.common.remat` keeps the entering states, and a ring's output, and
sends them once. Gathered keys, which are W times as many, are gathered again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas
from kernels_pallas.common import arguments, decay, segments
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
    """Computes `kernels_pallas.linear_attention` with time split over `axis_name`.

    The local state L = sum_t (k_t decayed to the shard's end) v_t^T is one matrix product. The
    operator runs from a zero state, so that it can run while L is sent. What the shard's tokens
    read of the entering state S is then added: o_t += S^T (q_t decayed from the shard's start). In
    the backward pass the cotangent of S is one product of q and the output's cotangent, and the
    operator's own backward pass need not wait for it. Cost beyond one device's work: 2 T K V
    multiply-adds per head in the forward pass, 4 T K V in the backward pass (5 with a decay per
    token).

    Each rank of W receives in the forward pass, in numbers of 4 bytes: all_gather
    (W-1) B H (K V + X), where X = K for a decay per channel and else 1, and 8 per row for segment
    ids; all_scan and ring B H K V, and 4 per row and block for ids. The backward pass receives the
    same without ids.

    In bfloat16 the output is rounded once more than on one device.
    """
    name = "linear_attention"
    arguments.check_qkv(name, q_BTHK, k_BTHK, v_BTHV)
    arguments.check_segment_ids(name, segment_ids, v_BTHV)
    form = collectives.form(name, axis_name, collective, blocks, v_BTHV.shape[-1])
    q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids = manual_axes.alike(
        (q_BTHK, k_BTHK, v_BTHV, log_decay, initial_state, segment_ids), axis_name
    )
    log_decay_BTHX = arguments.normal_log_decay(name, log_decay, q_BTHK, v_BTHV)
    initial_BHKV = arguments.normal_initial_state(name, initial_state, q_BTHK, v_BTHV)
    if arguments.nothing(q_BTHK, v_BTHV):
        return jnp.zeros_like(v_BTHV), form.ranks.from_last(initial_BHKV)
    # L and D of this shard. Checkpointed, since its residuals are cheaper made again than kept.
    run_BT, first_B, last_B = shard_maps.documents(segment_ids)
    local_BHKV, decay_BHX1 = jax.checkpoint(shard_maps.local_state)(
        k_BTHK, v_BTHV, log_decay_BTHX, run_BT
    )
    # Sent: L and D (all_gather), or D S + L (all_scan, ring).
    state_BHKV, final_BHKV = collectives.entering_state(
        form, local_BHKV, decay_BHX1, first_B, last_B, initial_state
    )
    # The shard on its own, from zero.
    keywords = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    keywords |= {"initial_state": jnp.zeros_like(state_BHKV), "segment_ids": segment_ids}
    o_BTHV, _ = kernels_pallas.linear_attention(q_BTHK, k_BTHK, v_BTHV, log_decay, **keywords)
    # What each token reads of the entering state.
    read_BTHV = jax.checkpoint(shard_maps.read_state)(q_BTHK, state_BHKV, log_decay_BTHX, run_BT)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    o_BTHV = (o_BTHV.astype(read_BTHV.dtype) + scale * read_BTHV).astype(o_BTHV.dtype)
    return o_BTHV, final_BHKV.astype(initial_BHKV.dtype)


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
    """Computes `kernels_pallas.delta_rule` with time split over `axis_name`.

    The shard's total decay is a matrix M (K, K) per head. One run of the operator with K more
    columns of values, [v, 0] from the state [0, I], gives outputs [o, O] and final states [L, M];
    then o_t += O_t S for the entering state S. Cost beyond one device's work: the K columns beside
    V in all that is V wide (the inverse in a chunk is not), 2 T K V multiply-adds for O S, and
    W K K V for composing the maps of W ranks. The collective comes after the operator in the
    forward pass, and before the operator's backward pass.

    Each rank receives, in the forward and in the backward pass, in numbers of 4 bytes: all_gather
    (W-1) B H (K V + K K), and 8 per row for segment ids in the forward pass; all_scan and ring
    B H K V, since M is not sent.

    In bfloat16 the output is rounded once more than on one device.
    """
    inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, initial_state, segment_ids
    keywords = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    how = axis_name, collective, blocks
    return shard_maps.by_transition_matrix(kernels_pallas.delta_rule, inputs, how, keywords)


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
    """Computes `kernels_pallas.diagonal_plus_low_rank` with time split over `axis_name`.

    A shard's total decay is a matrix (K, K) per head. It is found, sent and paid for as in
    `delta_rule`.
    """
    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay, initial_state, segment_ids
    keywords = {"scale": scale, "chunk_size": chunk_size, "implementation": implementation}
    operator, how = kernels_pallas.diagonal_plus_low_rank, (axis_name, collective, blocks)
    return shard_maps.by_transition_matrix(operator, inputs, how, keywords)


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
    """Computes `kernels_pallas.diagonal_scan` with time split over `axis_name`.

    The tokens' maps are first composed to the shard's map, h -> D h + L, in one pass that reads x
    and the decay; L and D are sent. The operator then runs once, from the state that enters the
    shard. The backward pass computes and sends the cotangent of that state in the same way, and the
    operator's own backward pass runs once. The state is T times smaller than the sequence, so the
    collective costs only latency; hiding it behind a run from a zero state would take a second pass
    over time that adds what the entering state contributes.

    Each rank of W receives, in the forward and in the backward pass, in numbers of 4 bytes (8 if
    complex): all_gather 2 (W-1) B D, and 8 per row for segment ids in the forward pass; all_scan
    and ring B D.
    """
    name = "diagonal_scan"
    arguments.check_array(name, "x", x_BTD)
    form = collectives.form(name, axis_name, collective, blocks, x_BTD.shape[-1], reverse=reverse)
    x_BTD, decay_BTD, log_decay, initial_state, segment_ids = manual_axes.alike(
        (x_BTD, decay_BTD, log_decay, initial_state, segment_ids), axis_name
    )
    # Raises what the plain operator raises, and gives its results' dtypes.
    given = {"log_decay": log_decay, "initial_state": initial_state, "segment_ids": segment_ids}
    operator = functools.partial(kernels_pallas.diagonal_scan, reverse=reverse)
    output, final_BD = _one_device_shapes(operator, x_BTD, decay_BTD, **given)
    decay_BTD = decay.factors(name, decay_BTD, log_decay, x_BTD.shape, final_BD.dtype)
    if initial_state is None:
        initial_state = jnp.zeros_like(x_BTD, shape=final_BD.shape)
    if arguments.nothing(x_BTD):
        final = form.ranks.from_last(initial_state.astype(final_BD.dtype))
        return jnp.zeros_like(x_BTD, output.dtype), final
    # A document's first token forgets everything before it: its decay is 0.
    ends = None, None
    if segment_ids is not None:
        start_BT = segments.starts(segment_ids, reverse=reverse)
        decay_BTD = jnp.where(start_BT[..., None], 0, decay_BTD)
        ends = segment_ids[:, 0], segment_ids[:, -1]
    call = shard_maps.ScanCall(form, reverse, implementation)
    initial_BD, ends = initial_state.astype(final_BD.dtype), ends[::-1] if reverse else ends
    h_BTD, final_BD = shard_maps.scan(call, x_BTD, decay_BTD, initial_BD, ends)
    return h_BTD, form.ranks.from_last(final_BD)


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
    """Computes `kernels_pallas.softmax_attention` with time split over `axis_name`.

    all_gather  One collective brings each of W ranks all keys and values, to which it attends with
                its own queries; in the backward pass a reduce-scatter returns their gradients
                (LASP-2H, arXiv 2502.07563, section 3.3). A rank receives (W-1) B T G (K + V)
                numbers of k's dtype, and 4 more per token for segment ids.
    ring        Keys and values travel round the ranks, and each rank merges its queries' results by
                log-sum-exp (ring attention, arXiv 2310.01889). In the backward pass they travel
                again, followed by their float32 gradients. The bytes are those of all_gather, in
                W - 1 messages, of which a rank holds one at a time: memory does not grow with W.
    window      With a window and no positions, under either collective, a rank receives only the
                window-1 tokens before its shard (with causal=False as many after it, too), from as
                many ranks as hold them: the bytes do not grow with W.

    A causal ring over contiguous shards would leave the first ranks idle, since blocks that no
    query sees cost nothing. Where T is even and no positions are given, each rank therefore first
    exchanges half of its shard, so that it has parts r and 2W-1-r of 2W (zigzag), and sends that
    half of its output back afterwards: two messages each. For a sequence in another order, such as
    `zigzag_order`, give positions in the whole sequence, and segment ids of queries and keys.

    k and v may be other tokens than q's (then with causal=False or with positions), in equal
    numbers on all ranks. Where kv_segment_ids_BS are given, ids are compared as they are; else a
    document is a run of equal ids. `implementation` applies to 'all_gather' and windows; a ring is
    always 'chunked'.
    """
    name = "softmax_attention"
    collectives.check_collective(name, collective, ("all_gather", "ring"))
    ranks = collectives.ranks(name, axis_name)
    inputs = q_BTHK, k_BTGK, v_BTGV, segment_ids, kv_segment_ids_BS, q_positions_BT, kv_positions_BS
    q_BTHK, k_BTGK, v_BTGV, segment_ids, *others = manual_axes.alike(inputs, axis_name)
    names = "segment_ids", "kv_segment_ids_BS", "q_positions_BT", "kv_positions_BS"
    given = dict(zip(names, (segment_ids, *others)))
    attend = functools.partial(
        kernels_pallas.softmax_attention, window=window, causal=causal, scale=scale
    )
    _one_device_shapes(attend, q_BTHK, k_BTGK, v_BTGV, **given)
    k_BTGK, v_BTGV = k_BTGK.astype(q_BTHK.dtype), v_BTGV.astype(q_BTHK.dtype)
    if 0 in (*q_BTHK.shape, *v_BTGV.shape):
        return attend(q_BTHK, k_BTGK, v_BTGV)  # empty, whatever is visible
    by_index = q_positions_BT is None and kv_segment_ids_BS is None
    if collective == "ring" and implementation not in (None, "chunked"):
        raise NotImplementedError(
            f"{name}: implementation {implementation!r} cannot run with collective='ring', "
            "which is 'chunked' itself"
        )
    qkv = q_BTHK, k_BTGK, v_BTGV
    halo = by_index and window is not None and k_BTGK.shape[1] == q_BTHK.shape[1]
    if collective == "ring" and not halo:
        return ring_attention.ring(ranks, qkv, given, by_index, window, causal, scale)
    attend = functools.partial(attend, implementation=implementation)
    if halo:
        return ring_attention.windowed(ranks, attend, qkv, segment_ids, window, causal)
    return ring_attention.gathered(ranks, attend, qkv, given)


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
    """Computes `kernels_pallas.causal_conv` with time split over `axis_name`.

    The I-1 tokens before a shard, I being the number of taps, come with their segment ids from the
    rank before, or from several ranks where shards are shorter: B (I-1) (D + 4) numbers of x's
    dtype, in one message per rank. The backward pass returns B (I-1) D.
    """
    name = "causal_conv"
    ranks = collectives.ranks(name, axis_name)
    x_BTD, w, bias, initial_state, segment_ids = manual_axes.alike(
        (x_BTD, w, bias, initial_state, segment_ids), axis_name
    )
    operator = functools.partial(
        kernels_pallas.causal_conv, activation=activation, l2_norm_heads=l2_norm_heads, eps=eps
    )
    call: dict[str, Any] = {"bias": bias, "segment_ids": segment_ids}
    call["initial_state"] = initial_state
    _, tail_like = _one_device_shapes(operator, x_BTD, w, **call)
    x_BTD = conv_reference.promoted(x_BTD, w, bias, initial_state)
    if not arguments.nothing(x_BTD):
        call["initial_state"] = collectives.preceding_tokens_of_document(
            ranks, x_BTD, w.shape[0] - 1, initial_state, segment_ids
        )
    y_BTD, tail = operator(x_BTD, w, **call, implementation=implementation)
    return y_BTD, conv_reference.demoted(ranks.from_last(tail), tail_like.dtype)


def shift(
    x_BTX: jax.Array,
    count: int = 1,
    *,
    axis_name: str | tuple[str, ...],
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Returns y_t = x_{t-count}, x shifted by `count` tokens, with time split over `axis_name`.

    x may have any dtype and trailing axes.

    initial_state: (B, count, ...), the tokens before the whole sequence, oldest first, the same on
      all ranks; None is zeros.
    segment_ids: int (B, T); y_t is zero where token t-count is of another document.
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
                f"shift: initial_state has dtype {initial_state.dtype}, x {x_BTX.dtype}; "
                "make x complex, too"
            )
    tokens = collectives.preceding_tokens_of_document(
        ranks, x_BTX, count, initial_state, segment_ids
    )
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
    """Computes `lax.associative_scan` over time (axis 1) with time split over `axis_name`.

    Returns a pytree like `elements`, in which each token has the composition of all elements up to
    its own. It serves an mLSTM's stabiliser (m -> max(a + m, b)), positions and counts. One
    all-gather brings each rank one element per row of every rank; JAX differentiates it.

    Args:
      compose: (first, then) -> both, associative, on pytrees like `elements`; it broadcasts.
      elements: a pytree of arrays (B, T, ...).
      reverse: whether elements are composed from the last token to the first; `compose` then gets
        the later element as `first`.
    """
    ranks = collectives.ranks("associative_scan", axis_name, reverse)
    for x in jax.tree.leaves(elements):
        arguments.check_array("associative_scan", "an element", x)
    if arguments.nothing(*jax.tree.leaves(elements)):
        return elements
    elements = manual_axes.alike(elements, axis_name)
    # Each shard on its own, and its last element on all ranks.
    composed = jax.lax.associative_scan(compose, elements, axis=1, reverse=reverse)
    leaves, structure = jax.tree.flatten(composed)
    end = [x[:, 0 if reverse else -1] for x in leaves]
    ends_W = collectives.unpack(ranks.gather(collectives.pack(end, lead=1)), end, lead=1)
    # The composition of all ranks up to the one before, composed with this shard's own.
    ends_W = jax.lax.associative_scan(compose, jax.tree.unflatten(structure, ends_W), axis=0)
    previous = jnp.maximum(ranks.index - 1, 0)
    prefix = jax.tree.map(
        lambda x_W, x: jnp.broadcast_to(jnp.take(x_W, previous, axis=0)[:, None], x.shape),
        ends_W,
        composed,
    )
    return jax.tree.map(
        lambda alone, both: jnp.where(ranks.index == 0, alone, both),
        composed,
        compose(prefix, composed),
    )


def _one_device_shapes(operator, *arrays, **keywords):
    """Returns the shapes of `operator`'s results on one device, or raises the errors it raises."""
    reference = functools.partial(operator, implementation="reference")
    return jax.eval_shape(reference, *arrays, **keywords)
