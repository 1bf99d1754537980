"""What ranks along a mesh axis tell each other, so that a recurrence runs through all their
stretches of time.

Over one rank's stretch every recurrence here is an affine map of the state that enters it, E = D S
+ L: L is what the stretch leaves when it starts from nothing, D what it makes of what entered, a
vector of decays or a matrix. Where a document begins inside the stretch D is 0, and where one
begins between two ranks nothing enters. So the states that enter,

    S_0 = 0        S_r = c_r (D_{r-1} S_{r-1} + L_{r-1}),        c_r = 1 iff one document spans
      ranks r-1 and r,

are all that ranks need of each other. The cotangent of L is the same recurrence, backwards: with
g_r that of S_r,

    dL_r = c_{r+1} (g_{r+1} + D_{r+1}^T dL_{r+1})        dD_r = dL_r S_r^T.

`entering` computes both with the same code. A rank's own part of either pass needs nothing that was
sent.

Exchanges (W ranks; a state is B H K V numbers, of 4 bytes each):
  all_gather  every rank receives all L and D in one collective, and composes what it needs: (W-1)
              states a rank (LASP-2, arXiv 2502.07563, algorithms 2 and 4, here with decays).
              Latency of one collective.
  all_scan    columns of the state in N blocks, each passed on from rank to rank as soon as it is
              there: one state a rank, D stays at home. Latency of (W + N - 2) messages of 1/N state
              (ZeCO, arXiv 2507.01004).
  ring        all_scan with one block: one state a rank in W - 1 messages, one after the other
              (LASP-1, arXiv 2404.02882).

Everything here is called inside `jax.shard_map`, and works with its `check_vma` on and off: what is
replicated is first made varying, and what is returned as replicated is a `psum` of one rank's
value, so that transposition does the right thing either way.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import arguments, dtypes
from kernels_pallas.common.remat import EXCHANGED, kept

COLLECTIVES = ("all_gather", "all_scan", "ring")
MOST_BLOCKS = 8  # of all_scan, where the caller does not say


class Ranks(NamedTuple):
    """The ranks of a mesh axis, in the order in which time runs."""

    axis_name: str | tuple[str, ...]  # of several the first is the slowest
    reverse: bool = False  # time runs from the last rank to the first

    @property
    def count(self) -> int:
        return lax.axis_size(self.axis_name)

    @property
    def index(self) -> jax.Array:
        """This rank's place: 0 has the beginning of time."""
        rank = lax.axis_index(self.axis_name)
        return self.count - 1 - rank if self.reverse else rank

    def backwards(self) -> "Ranks":
        return self._replace(reverse=not self.reverse)

    def send(self, x: jax.Array, pairs) -> jax.Array:
        """What comes to this rank's place, for pairs (from place, to place); zeros where nothing
        does."""
        if self.reverse:
            pairs = [(self.count - 1 - a, self.count - 1 - b) for a, b in pairs]
        return lax.ppermute(x, self.axis_name, pairs)

    def gather(self, x: jax.Array) -> jax.Array:
        """All ranks' x, with a new first axis, in the order of time."""
        gathered = lax.all_gather(x, self.axis_name)
        return gathered[::-1] if self.reverse else gathered

    def of_last(self, x: jax.Array) -> jax.Array:
        """The last rank's x, on all ranks. Removed by the compiler where nobody uses it."""
        return lax.psum(jnp.where(self.index == self.count - 1, x, 0), self.axis_name)


def ranks(operator: str, axis_name, reverse: bool = False) -> Ranks:
    """Raises ValueError where `axis_name` is not an axis, or a tuple of axes, that this code is
    mapped over.
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
            f"{operator}: no mesh axis {axis_name!r} is mapped here (mapped: {', '.join(bound) or 'none'}); call inside "
            f"jax.shard_map over a mesh that has this axis, with time split over it"
        ) from None
    return Ranks(names[0] if len(names) == 1 else names, reverse)


def check_collective(operator: str, collective: str, choices=COLLECTIVES) -> None:
    if collective not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{operator}: unknown collective {collective!r}; choose one of {listed}")


def check_blocks(operator: str, collective: str, blocks: int | None, columns: int) -> int:
    """The number of blocks that a state of so many columns is passed on in."""
    if collective != "all_scan":
        if blocks is not None:
            raise ValueError(
                f"{operator}: blocks is for collective='all_scan'; this is {collective!r}: leave blocks out"
            )
        return 1
    if blocks is None:
        few = range(min(MOST_BLOCKS, columns), 0, -1)
        return next((n for n in few if columns % n == 0), 1)
    if not arguments.is_count(blocks) or blocks < 1 or columns % blocks:
        divisors = [n for n in range(1, columns + 1) if columns % n == 0]
        raise ValueError(
            f"{operator}: blocks is {blocks!r}; it must divide the state's {columns} columns: one of {divisors}"
        )
    return blocks


# One buffer for everything that travels together. Integers and booleans go as their bytes, which
# are exact in every floating dtype and need no reinterpreted bits that hardware might take for a
# NaN; complex numbers as two real ones.


def pack(arrays, lead: int) -> jax.Array:
    """Arrays (or None) that share their first `lead` axes, as one real floating array with one axis
    more."""
    arrays = [_real(x) for x in arrays if x is not None]
    dtype = dtypes.common(*(x.dtype for x in arrays))
    flat = [x.astype(dtype).reshape(*x.shape[:lead], -1) for x in arrays]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)


def unpack(packed: jax.Array, like, lead: int) -> list:
    """The arrays that `pack` was given ones `like`; the packed array may have other lengths on its
    first `lead` axes."""
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
    """Not of booleans and integers of 2 or 4 bits, which fit into a byte each."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 8


class Form(NamedTuple):
    """How states are exchanged. matrix: D is (..., K, K), and acts on the state's axis -2; else D
    multiplies it."""

    collective: str
    ranks: Ranks
    blocks: int = 1
    matrix: bool = False


def entering(
    form: Form, local: jax.Array, decay: jax.Array, first_B=None, last_B=None, initial=None
) -> tuple[jax.Array, jax.Array]:
    """The state that enters this rank's stretch, and the one that the last rank's leaves, the same
    on all ranks.

    Args:
      form: how.
      local: (B, ..., V), what the stretch leaves when nothing enters.
      decay: what it makes of a state that enters: of local's rank and broadcast to it, or (..., K,
        K).
      first_B, last_B: ids of the documents of the stretch's first and last token, or None: one
        document.
      initial: the state before the first rank's, the same on all ranks, or None: zero.
    """
    ranks = form.ranks
    if initial is not None:
        initial = jnp.where(ranks.index == 0, initial, 0)
        local = local + _apply(form, decay, initial)
    state = _entering(form, local, decay, (first_B, last_B))
    leaving = local + _apply(form, decay, state)
    if initial is not None:
        state = state + initial
    return state, ranks.of_last(leaving)


def decayed(decay, state):
    """decay * state; 0 where either is, though a product of decays above 1 may be infinite."""
    return jnp.where((decay == 0) | (state == 0), 0, decay * state)


def _apply(form, decay, state):
    if not form.matrix:
        return decayed(decay, state)
    return jnp.einsum("...KJ,...JV->...KV", decay, state, precision=lax.Precision.HIGHEST)


def _over_state(flag_B, state):
    """A flag a row, to be broadcast to the state."""
    return flag_B.reshape(*flag_B.shape, *[1] * (state.ndim - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _entering(form, local, decay, ids):
    return _forward(form, local, decay, ids)[0]


def prefix_state(form: Form, local, decay, ids):
    """The state that enters, and whether (a flag a row, or None: yes) it is of the document of the
    rank before.

    Both are `kept`: where the rest of a layer is recomputed, nothing is sent a second time.
    """
    run = _gather if form.collective == "all_gather" else _scan
    return kept(run(form, local, decay, ids), EXCHANGED)


def prefix_state_gradient(form: Form, g, decay, joined_B):
    """The cotangent of `local`, where that of the state that enters is g."""
    if joined_B is not None:  # what came from another document gave nothing
        joined = _over_state(joined_B, g)
        g, decay = jnp.where(joined, g, 0), jnp.where(joined, decay, 0)
    if form.matrix:
        decay = jnp.swapaxes(decay, -1, -2)
    form = form._replace(ranks=form.ranks.backwards())
    return prefix_state(form, g, decay, (None, None))[0]


def _forward(form, local, decay, ids):
    state, joined_B = prefix_state(form, local, decay, ids)
    return state, (decay, state, joined_B)


def _backward(form, saved, g):
    decay, state, joined_B = saved
    d_local = prefix_state_gradient(form, g, decay, joined_B)
    if form.matrix:
        d_decay = jnp.einsum("...KV,...JV->...KJ", d_local, state, precision=lax.Precision.HIGHEST)
    else:
        d_decay = d_local * state
        summed = [n for n, size in enumerate(decay.shape) if size != d_decay.shape[n]]
        d_decay = jnp.sum(d_decay, axis=summed, keepdims=True)
    return d_local, d_decay.astype(decay.dtype), (None, None)


_entering.defvjp(_forward, _backward)


def _gather(form, local, decay, ids):
    """One collective; the states before this rank's are then composed, each rank for itself."""
    ranks = form.ranks
    payload = (local, decay, *ids)
    gathered = ranks.gather(pack(payload, lead=1))
    local_W, decay_W, first_WB, last_WB = unpack(gathered, payload, lead=1)
    joined_WB = None
    if first_WB is not None:
        joined_WB = jnp.concatenate(
            [jnp.zeros_like(first_WB[:1], bool), first_WB[1:] == last_WB[:-1]]
        )
    W, here = ranks.count, ranks.index
    before_W = jnp.arange(W) < here
    if form.matrix:
        state = _compose_matrices(form, local_W, decay_W, joined_WB, before_W)
    else:
        # weight_j = c_here (c D)_{here-1} ... (c D)_{j+1} for j < here: a product of what stands
        # behind j.
        def over(flags, x):
            return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))

        if joined_WB is not None:
            decay_W = jnp.where(over(joined_WB, decay_W), decay_W, 0)
        factor_W = jnp.where(over(before_W, decay_W), decay_W, 1)
        if joined_WB is not None:
            at_here = over(jnp.arange(W) == here, decay_W)
            factor_W = jnp.where(at_here, over(joined_WB, decay_W).astype(decay.dtype), factor_W)
        behind_W = jnp.concatenate([factor_W[1:], jnp.ones_like(factor_W[:1])])
        weight_W = lax.cumprod(behind_W, axis=0, reverse=True)
        weight_W = jnp.where(over(before_W, weight_W), weight_W, 0)
        state = jnp.sum(decayed(weight_W, local_W), axis=0)
    joined_B = None if joined_WB is None else jnp.take(joined_WB, here, axis=0)
    return state, joined_B


def _compose_matrices(form, local_W, decay_W, joined_WB, before_W):
    """S <- c (D S + L) over the ranks before this one."""
    joined_next = None if joined_WB is None else jnp.roll(joined_WB, -1, axis=0)

    def body(state, rank):
        local, decay, joined_B, before = rank
        after = local + _apply(form, decay, state)
        if joined_B is not None:
            after = jnp.where(_over_state(joined_B, after), after, 0)
        return jnp.where(before, after, state), None

    start = jnp.zeros_like(local_W[0])
    state, _ = lax.scan(body, start, (local_W, decay_W, joined_next, before_W))
    return state


def _scan(form, local, decay, ids):
    """Block b leaves the rank in place r at step r + b: a wave through the ranks, each in turn at
    its next block."""
    ranks, N = form.ranks, form.blocks
    W, here = ranks.count, ranks.index
    first_B, last_B = ids
    width = local.shape[-1] // N
    state = jnp.zeros_like(local)
    joined_B = None if first_B is None else jnp.zeros_like(first_B, bool)

    def block(x, b):
        """Columns of block b; those of D, where it has as many, too. Out of range some other: it is
        not sent."""
        return lax.dynamic_slice_in_dim(x, b * width, width, axis=x.ndim - 1)

    def decay_of(b):
        return decay if form.matrix or decay.shape[-1] == 1 else block(decay, b)

    for step in range(W + N - 2 if W > 1 else 0):
        b = step - here
        leaving = block(local, b) + _apply(form, decay_of(b), block(state, b))
        payload = (leaving, last_B)
        pairs = [(place, place + 1) for place in range(W - 1) if 0 <= step - place < N]
        arrived, from_B = unpack(ranks.send(pack(payload, lead=1), pairs), payload, lead=1)
        # Who receives nothing now receives zeros, and adds them to some block.
        if first_B is not None:
            same_B = (from_B == first_B) & (here > 0)
            arrived = jnp.where(_over_state(same_B, arrived), arrived, 0)
            joined_B = jnp.where(step == here - 1, same_B, joined_B)
        start = (b + 1) * width
        old = lax.dynamic_slice_in_dim(state, start, width, axis=state.ndim - 1)
        state = lax.dynamic_update_slice_in_dim(state, old + arrived, start, axis=state.ndim - 1)
    return state, joined_B


def before(
    ranks: Ranks, x_BTX: jax.Array, count: int, initial: jax.Array | None = None
) -> jax.Array:
    """The `count` tokens before this rank's stretch, oldest first, of however many ranks: (B,
    count, ...).

    initial: (B, count, ...), what stands before the first rank's; None is zeros.
    """
    T, W = x_BTX.shape[1], ranks.count
    parts = []
    for hop in range(min(-(-count // T), W - 1), 0, -1):
        tail = x_BTX[:, T - min(count - (hop - 1) * T, T) :]
        parts.append(ranks.send(tail, [(place, place + hop) for place in range(W - hop)]))
    missing = count - sum(part.shape[1] for part in parts)
    nothing = jnp.zeros_like(x_BTX, shape=(x_BTX.shape[0], missing, *x_BTX.shape[2:]))
    tokens = jnp.concatenate([nothing, *parts], axis=1)
    if initial is None:
        return tokens
    entered = jnp.concatenate([initial.astype(x_BTX.dtype), jnp.zeros_like(tokens)], axis=1)
    start = jnp.minimum(ranks.index * T, count)
    exists_N = (
        ranks.index * T + jnp.arange(count, dtype=jnp.int32) >= count
    )  # in the sequence, so a rank sent it
    exists_NX = exists_N.reshape(1, count, *[1] * (x_BTX.ndim - 2))
    entered = lax.dynamic_slice_in_dim(entered, start, count, axis=1)
    return jnp.where(exists_NX, tokens, entered)


def tokens_before(ranks, x_BTX, count, initial, segment_ids_BT):
    """The `count` tokens before the stretch, zero where they are not of its first token's document."""
    if count == 0 or segment_ids_BT is None:
        return before(ranks, x_BTX, count, initial)
    B, T = segment_ids_BT.shape
    travelling = x_BTX, segment_ids_BT
    if initial is not None:
        initial = initial.astype(x_BTX.dtype)
        initial = pack((initial, jnp.zeros_like(segment_ids_BT, shape=(B, count))), lead=2)
    packed = before(ranks, pack(travelling, lead=2), count, initial)
    tokens, ids_BN = unpack(packed, travelling, lead=2)
    ids_BM = jnp.concatenate([ids_BN, segment_ids_BT[:, :1]], axis=1)
    # What stood before the sequence is of the first token's document, whatever that is.
    initial_N = ranks.index * T + jnp.arange(count, dtype=jnp.int32) < count
    same_BN = (ids_BM[:, 1:] == ids_BM[:, :-1]) | initial_N[None]
    kept_BN = jax.lax.cumprod(same_BN.astype(jnp.int32), axis=1, reverse=True) == 1
    kept_BNX = kept_BN.reshape(B, count, *[1] * (x_BTX.ndim - 2))
    return jnp.where(kept_BNX, tokens, jnp.zeros_like(tokens))
