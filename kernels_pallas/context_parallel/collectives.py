"""Passes a recurrence's state between ranks that hold consecutive shards of a sequence.

Over one shard every recurrence here maps the state S that enters to D S + L. The local state L is
what the shard leaves when it starts from zero; its total decay D is a vector or a matrix, and zero
where a document begins inside the shard. All that ranks need of each other are the prefix states,

    S_0 = 0        S_r = c_r (D_{r-1} S_{r-1} + L_{r-1}),

with c_r = 1 if one document holds the last token of rank r-1 and the first of rank r, else 0. The
cotangents of the local states obey the same recurrence from the last rank to the first: with g_r
the cotangent of S_r,

    dL_r = c_{r+1} (g_{r+1} + D_{r+1}^T dL_{r+1})        dD_r = dL_r S_r^T.

`prefix_state` computes both. W ranks have three ways to do it (a state is B H K V numbers):

    all_gather  One collective brings every rank all L and D, and each rank composes those before
                it: (W-1) states received, the latency of one collective. LASP-2, arXiv 2502.07563,
                algorithms 2 and 4, here with decays.
    all_scan    The state's columns in N blocks, each passed on to the next rank as soon as it is
                there: one state received, the latency of W + N - 2 messages of 1/N state; D stays
                at home. ZeCO, arXiv 2507.01004.
    ring        all_scan with one block: one state received, in W - 1 messages one after the other.
                LASP-1, arXiv 2404.02882.

Everything here is called inside `jax.shard_map`, with its `check_vma` on or off: replicated
operands are made varying first, and what is returned as replicated is a `psum` of one rank's value,
so that transposition is right either way.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import arguments, dtypes, remat
from kernels_pallas.common.dtypes import custom_vjp

COLLECTIVES = ("all_gather", "all_scan", "ring")
MOST_BLOCKS = 8  # of all_scan, unless the caller gives a number


class Ranks(NamedTuple):
    """Fields of a mesh axis along which time is split; place 0 holds the first shard in time."""

    axis_name: str | tuple[str, ...]  # the first of several axes is the slowest
    reverse: bool = False  # whether time runs from the last rank to the first

    @property
    def count(self) -> int:
        return lax.axis_size(self.axis_name)

    @property
    def index(self) -> jax.Array:
        """Returns this rank's place in the order of time; place 0 holds the first shard."""
        rank = lax.axis_index(self.axis_name)
        return self.count - 1 - rank if self.reverse else rank

    def reversed(self) -> "Ranks":
        return self._replace(reverse=not self.reverse)

    def send(self, x: jax.Array, pairs) -> jax.Array:
        """Sends x between ranks by `pairs` (from, to) of places; returns what arrives, or zeros."""
        if self.reverse:
            pairs = [(self.count - 1 - a, self.count - 1 - b) for a, b in pairs]
        return lax.ppermute(x, self.axis_name, pairs)

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns x of every rank, stacked along a new first axis in the order of time."""
        gathered = lax.all_gather(x, self.axis_name)
        return gathered[::-1] if self.reverse else gathered

    def from_last(self, x: jax.Array) -> jax.Array:
        """Returns the last rank's x on every rank; compiles to nothing where it is unused."""
        return lax.psum(jnp.where(self.index == self.count - 1, x, 0), self.axis_name)


class CollectiveForm(NamedTuple):
    """Fields that say how recurrent states pass between `ranks`, by one of COLLECTIVES.

    blocks: number of column blocks in which "all_scan" sends a state. matrix: whether a shard's
      total decay D is a matrix (..., K, K) that multiplies the state along its axis -2; else D
      multiplies the state element by element.
    """

    collective: str
    ranks: Ranks
    blocks: int = 1
    matrix: bool = False


def ranks(operator: str, axis_name, reverse: bool = False) -> Ranks:
    """Returns the Ranks of a mesh axis, or of a tuple of axes.

    Raises ValueError, naming `operator`, outside of a jax.shard_map over `axis_name`.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        for name in names:
            lax.axis_size(name)
        if not names:
            raise NameError
    except (NameError, TypeError):
        bound = sorted(map(str, jax.sharding.get_abstract_mesh().manual_axes))
        raise ValueError(
            f"{operator}: no mesh axis {axis_name!r} is mapped here "
            f"(mapped: {', '.join(bound) or 'none'}); call inside jax.shard_map over a mesh that "
            "has this axis, with time split over it"
        ) from None
    return Ranks(names[0] if len(names) == 1 else names, reverse)


def form(
    operator: str,
    axis_name: str | tuple[str, ...],
    collective: str,
    blocks: int | None,
    columns: int,
    *,
    reverse: bool = False,
    matrix: bool = False,
) -> CollectiveForm:
    """Checks an operator's context-parallel options and returns them as a CollectiveForm.

    blocks: of the state's `columns` (its last axis) for "all_scan"; None is their largest divisor
      up to MOST_BLOCKS.

    Raises ValueError, naming `operator`, for an unknown collective, a mesh axis that no
    jax.shard_map maps, or blocks that do not divide the columns.
    """
    check_collective(operator, collective)
    blocks = _checked_blocks(operator, collective, blocks, columns)
    return CollectiveForm(collective, ranks(operator, axis_name, reverse), blocks, matrix)


def check_collective(operator: str, collective: str, choices=COLLECTIVES) -> None:
    if collective not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{operator}: unknown collective {collective!r}; choose one of {listed}")


def _checked_blocks(operator: str, collective: str, blocks: int | None, columns: int) -> int:
    if collective != "all_scan":
        if blocks is not None:
            raise ValueError(
                f"{operator}: blocks is for collective='all_scan'; this is {collective!r}: "
                "leave blocks out"
            )
        return 1
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    if blocks is None:
        return max((n for n in divisors if n <= MOST_BLOCKS), default=1)
    if not arguments.is_count(blocks) or blocks not in divisors:
        raise ValueError(
            f"{operator}: blocks is {blocks!r}; it must divide the state's {columns} columns: "
            f"one of {divisors}"
        )
    return blocks


# Arrays that travel together share one floating buffer, so that each step is one collective.
# Integers and booleans travel as their bytes, each a floating number: bytes are exact in every
# floating dtype, and reinterpreted bits might be taken for a NaN. Complex numbers travel as pairs.


def pack(arrays, lead: int) -> jax.Array:
    """Joins arrays of any dtypes into one real floating array, so that one message carries them.

    The arrays have the same first `lead` axes; their other axes are flattened and joined along one
    last axis. Nones in `arrays` are left out.
    """
    arrays = [_real(x) for x in arrays if x is not None]
    dtype = dtypes.common(*(x.dtype for x in arrays))
    flat = [x.astype(dtype).reshape(*x.shape[:lead], -1) for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)


def unpack(packed: jax.Array, like, lead: int) -> list:
    """Splits a buffer that `pack` made of arrays `like` these, or Nones, into such arrays again."""
    arrays, start = [], 0
    for x in like:
        if x is None:
            arrays.append(None)
            continue
        shape = jax.eval_shape(_real, x).shape[lead:]
        stop = start + math.prod(shape)
        part = packed[..., start:stop].reshape(*packed.shape[:-1], *shape)
        arrays.append(_unreal(part, x.dtype))
        start = stop
    return arrays


def _real(x):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x if x.dtype.itemsize > 1 else x.astype(jnp.bfloat16)
    if _fills_bytes(x.dtype):
        x = lax.bitcast_convert_type(x, jnp.uint8)
    return x.astype(jnp.uint8).astype(jnp.bfloat16)


def _unreal(x, dtype):
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(x[..., 0], x[..., 1]).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    x = x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, dtype) if _fills_bytes(dtype) else x.astype(dtype)


def _fills_bytes(dtype) -> bool:
    """Returns whether a dtype is an integer of at least 8 bits, so neither boolean nor 4-bit."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 8


def entering_state(
    form: CollectiveForm,
    local: jax.Array,
    decay: jax.Array,
    first_B: jax.Array | None = None,
    last_B: jax.Array | None = None,
    initial: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the state S that enters this shard, and the sequence's final state, on all ranks.

    Args:
      local: L (B, ..., V) of the shard's map S -> D S + L, its final state from a zero state.
      decay: D, the product of the shard's decays, which broadcasts to L or is (..., K, K).
      first_B, last_B: document ids of the shard's first and last token; None is one document.
      initial: the state before the whole sequence, the same on all ranks; None is zero.
    """
    ranks = form.ranks
    # The initial state enters the first shard alone, and the others as part of its local state.
    if initial is not None:
        initial = jnp.where(ranks.index == 0, initial, 0)
        local = local + _apply(form, decay, initial)
    state = _prefix_state(form, local, decay, (first_B, last_B))
    final = local + _apply(form, decay, state)
    if initial is not None:
        state = state + initial
    return state, ranks.from_last(final)


def decayed(decay, state):
    """Returns decay * state, and 0 where either factor is 0 even if the other is infinite."""
    return jnp.where((decay == 0) | (state == 0), 0, decay * state)


def _apply(form, decay, state):
    if not form.matrix:
        return decayed(decay, state)
    return jnp.einsum("...KJ,...JV->...KV", decay, state, precision=lax.Precision.HIGHEST)


def _over_state(flag_B, state):
    """Reshapes flags (B,) to (B, 1, ..., 1), so that they broadcast to a state (B, ...)."""
    return flag_B.reshape(*flag_B.shape, *[1] * (state.ndim - 1))


def prefix_state(form: CollectiveForm, local, decay, ids):
    """Returns the prefix state S_r that enters this rank's shard, and c_r, as in the module's text.

    c_r (B,) says whether one document spans the border before the shard; None without ids. Both
    have the checkpoint name remat.ENTERING_STATES: a recomputed layer that saves it sends nothing.

    local, decay: L and D of the shard. ids: document ids of its first and last token, or Nones.
    """
    run = _gather if form.collective == "all_gather" else _scan
    return remat.named(run(form, local, decay, ids), remat.ENTERING_STATES)


def prefix_state_gradient(form: CollectiveForm, g, decay, joined_B):
    """Returns dL_r, the cotangent of this rank's local state, from g, that of its prefix state.

    decay is the shard's total decay D_r, and joined_B is c_r from `prefix_state`.
    """
    # c_r cuts both terms: another document's state gave nothing.
    if joined_B is not None:
        joined = _over_state(joined_B, g)
        g, decay = jnp.where(joined, g, 0), jnp.where(joined, decay, 0)
    if form.matrix:
        decay = jnp.swapaxes(decay, -1, -2)
    # The recurrence of the forward pass, from the last rank to the first.
    form = form._replace(ranks=form.ranks.reversed())
    return prefix_state(form, g, decay, (None, None))[0]


@custom_vjp(0)
def _prefix_state(form, local, decay, ids):
    return _forward(form, local, decay, ids)[0]


def _forward(form, local, decay, ids):
    state, joined_B = prefix_state(form, local, decay, ids)
    return state, (decay, state, joined_B)


def _backward(form, saved, g):
    decay, state, joined_B = saved
    d_local = prefix_state_gradient(form, g, decay, joined_B)
    # dD_r = dL_r S_r^T; of a vector the diagonal, summed over what D was broadcast over.
    if form.matrix:
        d_decay = jnp.einsum("...KV,...JV->...KJ", d_local, state, precision=lax.Precision.HIGHEST)
    else:
        d_decay = d_local * state
        summed = [n for n, size in enumerate(decay.shape) if size != d_decay.shape[n]]
        d_decay = jnp.sum(d_decay, axis=summed, keepdims=True)
    return d_local, d_decay.astype(decay.dtype), (None, None)


_prefix_state.defvjp(_forward, _backward)


def _gather(form, local, decay, ids):
    """Computes S_r and c_r by one all-gather of L, D and ids; each rank composes its own prefix."""
    ranks = form.ranks
    payload = (local, decay, *ids)
    gathered = ranks.gather(pack(payload, lead=1))
    local_W, decay_W, first_WB, last_WB = unpack(gathered, payload, lead=1)
    W, here = ranks.count, ranks.index
    earlier_W = jnp.arange(W) < here
    # c_r of every rank; nothing comes before the first.
    joined_WB = joined_B = None
    if first_WB is not None:
        joined_WB = jnp.concatenate(
            [jnp.zeros_like(first_WB[:1], bool), first_WB[1:] == last_WB[:-1]]
        )
        joined_B = jnp.take(joined_WB, here, axis=0)
    if form.matrix:
        return _compose_matrices(form, local_W, decay_W, joined_WB, earlier_W), joined_B

    def over(flags, x):
        return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))

    # L_j reaches this rank with the weight c_here (c D)_{here-1} ... (c D)_{j+1}: a product of one
    # factor for each rank after j, which is 1 beyond this rank.
    if joined_WB is not None:
        decay_W = jnp.where(over(joined_WB, decay_W), decay_W, 0)
    factor_W = jnp.where(over(earlier_W, decay_W), decay_W, 1)
    if joined_WB is not None:
        at_here = over(jnp.arange(W) == here, decay_W)
        factor_W = jnp.where(at_here, over(joined_WB, decay_W).astype(decay.dtype), factor_W)
    later_W = jnp.concatenate([factor_W[1:], jnp.ones_like(factor_W[:1])])
    weight_W = lax.cumprod(later_W, axis=0, reverse=True)
    weight_W = jnp.where(over(earlier_W, weight_W), weight_W, 0)
    # S_here = sum_j weight_j L_j
    return jnp.sum(decayed(weight_W, local_W), axis=0), joined_B


def _compose_matrices(form, local_W, decay_W, joined_WB, earlier_W):
    """Returns the prefix state from all ranks' L and matrices D: S <- c (D S + L), rank by rank."""
    joined_next_WB = None if joined_WB is None else jnp.roll(joined_WB, -1, axis=0)

    def body(state, rank):
        local, decay, joined_B, earlier = rank
        final = local + _apply(form, decay, state)
        if joined_B is not None:
            final = jnp.where(_over_state(joined_B, final), final, 0)
        return jnp.where(earlier, final, state), None

    start = jnp.zeros_like(local_W[0])
    state, _ = lax.scan(body, start, (local_W, decay_W, joined_next_WB, earlier_W))
    return state


def _scan(form, local, decay, ids):
    """Computes S_r and c_r by messages: rank r sends column block b of D S + L on in step r + b."""
    ranks, N = form.ranks, form.blocks
    W, here = ranks.count, ranks.index
    first_B, last_B = ids
    width = local.shape[-1] // N
    state = jnp.zeros_like(local)
    joined_B: Any = None if first_B is None else jnp.zeros_like(first_B, bool)

    def block(x, b):
        # Out of range this is another block, which is not sent.
        return lax.dynamic_slice_in_dim(x, b * width, width, axis=x.ndim - 1)

    def decay_of(b):
        return decay if form.matrix or decay.shape[-1] == 1 else block(decay, b)

    for step in range(W + N - 2 if W > 1 else 0):
        # D S + L of this rank's next block goes to the next rank.
        b = step - here
        leaving = block(local, b) + _apply(form, decay_of(b), block(state, b))
        payload = (leaving, last_B)
        pairs = [(place, place + 1) for place in range(W - 1) if 0 <= step - place < N]
        arrived, from_B = unpack(ranks.send(pack(payload, lead=1), pairs), payload, lead=1)
        # A rank that is sent nothing in this step receives zeros, and adds them to some block.
        if first_B is not None:
            same_B = (from_B == first_B) & (here > 0)
            arrived = jnp.where(_over_state(same_B, arrived), arrived, 0)
            joined_B = jnp.where(step == here - 1, same_B, joined_B)
        start = (b + 1) * width
        old = lax.dynamic_slice_in_dim(state, start, width, axis=state.ndim - 1)
        state = lax.dynamic_update_slice_in_dim(state, old + arrived, start, axis=state.ndim - 1)
    return state, joined_B


def preceding_tokens(
    ranks: Ranks, x_BTX: jax.Array, count: int, initial: jax.Array | None = None
) -> jax.Array:
    """Returns the `count` tokens before this rank's shard, oldest first: (B, count, ...).

    Each rank that holds some of these tokens sends one message. x_BTX is this rank's shard, and
    initial (B, count, ...) the tokens before the whole sequence; None is zeros.
    """
    T, W = x_BTX.shape[1], ranks.count
    # The shard `hop` ranks earlier sends its last tokens, as many as are still missing.
    parts = []
    for hop in range(min(-(-count // T), W - 1), 0, -1):
        tail = x_BTX[:, T - min(count - (hop - 1) * T, T) :]
        parts.append(ranks.send(tail, [(place, place + hop) for place in range(W - hop)]))
    missing = count - sum(part.shape[1] for part in parts)
    nothing = jnp.zeros_like(x_BTX, shape=(x_BTX.shape[0], missing, *x_BTX.shape[2:]))
    tokens = jnp.concatenate([nothing, *parts], axis=1)
    if initial is None:
        return tokens
    # Positions before the sequence, which no rank sent, get the last of the initial tokens.
    padded = jnp.concatenate([initial.astype(x_BTX.dtype), jnp.zeros_like(tokens)], axis=1)
    start = jnp.minimum(ranks.index * T, count)
    padded = lax.dynamic_slice_in_dim(padded, start, count, axis=1)
    sent_N = ranks.index * T + jnp.arange(count, dtype=jnp.int32) >= count
    return jnp.where(sent_N.reshape(1, count, *[1] * (x_BTX.ndim - 2)), tokens, padded)


def preceding_tokens_of_document(ranks, x_BTX, count, initial, segment_ids_BT):
    """Returns `preceding_tokens`, with zeros for tokens before the shard's first document."""
    if count == 0 or segment_ids_BT is None:
        return preceding_tokens(ranks, x_BTX, count, initial)
    B, T = segment_ids_BT.shape
    # The ids travel with the tokens.
    payload = x_BTX, segment_ids_BT
    if initial is not None:
        initial = initial.astype(x_BTX.dtype)
        initial = pack((initial, jnp.zeros_like(segment_ids_BT, shape=(B, count))), lead=2)
    packed = preceding_tokens(ranks, pack(payload, lead=2), count, initial)
    tokens, ids_BN = unpack(packed, payload, lead=2)
    # A token counts if its id, and every later one up to the shard, equals the next. Initial tokens
    # are of the first token's document, whatever that is.
    ids_BM = jnp.concatenate([ids_BN, segment_ids_BT[:, :1]], axis=1)
    initial_N = ranks.index * T + jnp.arange(count, dtype=jnp.int32) < count
    same_BN = (ids_BM[:, 1:] == ids_BM[:, :-1]) | initial_N[None]
    read_BN = jax.lax.cumprod(same_BN.astype(jnp.int32), axis=1, reverse=True) == 1
    read_BNX = read_BN.reshape(B, count, *[1] * (x_BTX.ndim - 2))
    return jnp.where(read_BNX, tokens, jnp.zeros_like(tokens))
