"""The diagonal recurrence as Mosaic TPU kernels, forward and backward.

The equations are those of docs/math/diagonal_scan.md. The grid is (rows of the batch, channels,
chunks of time). Time is last and in order, and the state stays in VMEM from one chunk to the next.
x, the decay and h pass through HBM once each; backward x, the decay, the gradient of h, and the
results.

A register holds 8 x 128 numbers. A chunk of C tokens is cut into 8 runs of C/8, and row s of a
register walks through run s, so that every operation works on eight tokens of 128 channels. Eight
rows that lie equally far apart can be read at once from memory that is 128 channels wide, if the
distance is no multiple of 8 (else they share a bank). So a block is first copied to such columns,
in float32, with 4 unused rows between runs, and then

  1. the map h -> A h + b of every run takes C/8 steps,
  2. the state that enters each run takes eight steps on single rows,
  3. every state takes C/8 steps again.

Backward, time runs the other way. The carry from token t+1 to t is c_t = a_{t+1} l_{t+1}, which
begins as the gradient of the final state and ends as that of the initial one:

    l_t = g_t + c_t      c_{t-1} = a_t l_t      dx_t = l_t      da_t = l_t h_{t-1}

The residuals are the states that enter the chunks. From them a chunk's h are computed again, in
float32: those that the call returned may be rounded. Decays above 1 are right as long as those of
one run, chunk_size / 8 tokens, multiply to a float32. A document's start is a decay of 0, which
lets pass what is not finite. A complex number is a tuple of two arrays, real and imaginary
("planes"), a real one a tuple of one; between planes the transpose of a product with a is a product
with its conjugate.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import kernel_vjp
from kernels_pallas.dispatch import devices, tuning
from kernels_pallas.ops.diagonal_scan import chunked
from kernels_pallas.tpu import tiling as tpu_tiling

LANES, RUNS = 128, 8
# The sizes where `tuned.json` says nothing else. width: registers side by side, enough independent
# work to hide a step's latency.
SIZES = {"chunk_size": 256, "width": 8}
UNROLL = 8
GAP = 4  # rows between runs


def unsupported_reason(x_BTD, decay_BTD, initial_state_BD, reverse=False) -> str | None:
    """Returns None if the TPU kernels can run this call, else the reason."""
    for name, array in (("x", x_BTD), ("decay", decay_BTD), ("initial_state", initial_state_BD)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return (
                f"{name} is {array.dtype}; it takes float32, bfloat16 and complex64 "
                "('chunked' takes all)"
            )
    return None


def run(x_BTD, decay_BTD, initial_state_BD, reverse=False):
    """Computes h_t = decay_t * h_{t-1} + x_t by the TPU kernels; returns h and the final state.
    Arguments are normalised by `api.py`. reverse: whether h_t comes from h_{t+1} instead."""
    if not jnp.iscomplexobj(decay_BTD):
        planes = (x_BTD,), (decay_BTD,), (initial_state_BD,)
        (h_BTD,), (final_BD,) = _scan(reverse, None, *planes)
        return h_BTD, final_BD
    planes = ((jnp.real(z), jnp.imag(z)) for z in (x_BTD, decay_BTD, initial_state_BD))
    h, final = _scan(reverse, None, *(tuple(p.astype(jnp.float32) for p in z) for z in planes))
    return lax.complex(*h), lax.complex(*final)


def _forward(reverse, _, x, decay, initial):
    """Returns ((h in x's dtype, the final state), the states that enter the chunks). All are tuples
    of planes (real, and imaginary if complex): x and decay (B, T, D), initial (B, D)."""
    tiling = _Tiling.of(x, reverse)
    P, states = tiling.planes, [z[:, None, None] for z in initial]
    outputs = _launch(
        tiling,
        _forward_kernel,
        [(z, kind) for planes, kind in ((x, "t"), (decay, "t"), (states, "s")) for z in planes],
        [*((z.dtype, "t") for z in x), *((jnp.float32, kind) for kind in "ns" for _ in x)],
    )
    h, entering, final = outputs[:P], outputs[P : 2 * P], outputs[2 * P :]
    return (h, tuple(z[:, 0, 0] for z in final)), entering


def _backward(reverse, _, arrays, entering, cotangents):
    (x, decay, _), (g, g_final) = arrays, cotangents
    tiling = _Tiling.of(x, reverse)
    P, states = tiling.planes, [z[:, None, None] for z in g_final]
    kinds = ((g, "t"), (decay, "t"), (x, "t"), (entering, "n"), (states, "s"))
    outputs = _launch(
        tiling,
        _backward_kernel,
        [(z, kind) for planes, kind in kinds for z in planes],
        [*((z.dtype, "t") for z in x), *((jnp.float32, kind) for kind in "ts" for _ in x)],
    )
    return outputs[:P], outputs[P : 2 * P], tuple(z[:, 0, 0] for z in outputs[2 * P :])


def _plain(reverse, _, *planes):
    x, decay, initial = (z[0] if len(z) == 1 else lax.complex(*z) for z in planes)
    results = chunked.run(x, decay, initial, reverse=reverse)
    if len(planes[0]) == 1:
        return tuple((z,) for z in results)
    return tuple((jnp.real(z), jnp.imag(z)) for z in results)


_scan = kernel_vjp.differentiable(_forward, _backward, _plain)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Sizes of one call on a TPU and of its blocks: b rows of the batch, C tokens, d channels.
    planes: 1 for real numbers, 2 for complex ones. reverse: whether h_t comes from h_{t+1}."""

    B: int
    T: int
    D: int
    planes: int
    reverse: bool
    b: int
    C: int
    d: int

    @classmethod
    def of(cls, x, reverse):
        """Returns the tiling of a call, with blocks of up to the tuned `width` registers. It takes
        the channels that waste least, then as many rows of the batch as fit."""
        (B, T, D), planes = x[0].shape, len(x)
        kind = f"{D} {'real' if planes == 1 else 'complex'}"
        sizes = tuning.lookup(SIZES, "diagonal_scan", "pallas_tpu", str(x[0].dtype), kind)
        tiles, most = pl.cdiv(D, LANES), sizes["width"] // planes
        width = min(
            range(min(tiles, most), 0, -1),
            key=lambda w: pl.cdiv(tiles, w) * max(w, most // 2),
        )
        rows = max(n for n in range(1, most // width + 1) if B % n == 0)
        # A run is a multiple of 8 rows, so that it begins with a register, and a chunk with a tile
        # of bfloat16.
        C = min(sizes["chunk_size"], pl.cdiv(T, 8 * RUNS) * 8 * RUNS)
        return cls(B, T, D, planes, reverse, rows, C, width * LANES)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.T, self.C)

    @property
    def columns(self) -> int:
        return self.b * self.d // LANES

    @property
    def run(self) -> int:
        return self.C // RUNS

    def spec(self, kind: str, from_last: bool):
        """Returns the block spec of an array: over time ("t"), of every chunk's state ("n"), or of
        one state ("s"). from_last: whether the grid begins at the last chunk."""

        def chunk(n):
            return self.chunks - 1 - n if from_last else n

        if kind == "t":
            return pl.BlockSpec((self.b, self.C, self.d), lambda i, k, n: (i, chunk(n), k))
        return pl.BlockSpec(
            (self.b, None, 1, self.d),
            lambda i, k, n: (i, chunk(n) if kind == "n" else 0, 0, k),
        )

    def shape(self, kind: str) -> tuple[int, ...]:
        """Returns the shape of a whole array of one of the kinds of `spec`."""
        if kind == "t":
            return self.B, self.T, self.D
        return self.B, self.chunks if kind == "n" else 1, 1, self.D


def _launch(tiling: _Tiling, kernel, inputs, outputs):
    """Launches the forward or backward kernel and returns a list of its outputs. inputs, outputs:
    (array, kind) and (dtype, kind) pairs, with the kinds of `_Tiling.spec`."""
    backward = kernel is _backward_kernel
    from_last = tiling.reverse != backward
    # Columns: a state, a map per run (A and b), and two blocks; backward also those of h.
    block = RUNS * (tiling.run + GAP)
    rows = (1, RUNS, RUNS, block, block, *((1, RUNS, block) if backward else ()))
    shapes = [(jax.ShapeDtypeStruct(tiling.shape(kind), dtype), kind) for dtype, kind in outputs]
    read, written = (
        [(tiling.spec(kind, from_last), x) for x, kind in side] for side in (inputs, shapes)
    )
    return tpu_tiling.launch(
        functools.partial(kernel, tiling, from_last),
        f"diagonal_scan{kernel.__name__.removesuffix('_kernel')}",
        (tiling.B // tiling.b, pl.cdiv(tiling.D, tiling.d), tiling.chunks),
        read,
        written,
        [(tiling.columns, n, LANES) for n in rows for _ in range(tiling.planes)],
        semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit=None,
    )


def _forward_kernel(tiling: _Tiling, from_last: bool, *refs):
    x_in, decay_in, initial, h, entering, final, *scratch = _grouped(refs, tiling.planes)
    state, A, b, decay, x = scratch
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        _to_columns(state, initial)

    _to_columns(x, x_in)
    _to_columns(decay, decay_in)
    _from_columns(entering, state)
    _states(_Walk(tiling, from_last, n), decay, x, A, b, state)
    _from_columns(h, x)

    @pl.when(n == tiling.chunks - 1)
    def _():
        _from_columns(final, state)


def _states(walk, decay, x, A, b, state):
    """Computes every h of a chunk, written in place of x; all are references to scratch arrays.

    `state` holds the state that enters the chunk, then the one that leaves it. Afterwards A holds
    the states that enter the 8 runs of consecutive tokens.
    """
    zero, one = _constants(walk.tiling.planes)

    def inputs(i):
        return walk.tokens(decay, i, one), walk.tokens(x, i, zero)

    def extend(i, carry):
        # (a, x) after (A, b): h -> a A h + (a b + x)
        (A, b), (a, x) = carry, inputs(i)
        return _times(a, A), _plus(_times(a, b), x)

    def emit(i, h):
        a, x_i = inputs(i)
        h = _plus(_times(a, h), x_i)
        walk.put(x, i, h)
        return h

    entering = walk.entering(extend, A, b, state)
    lax.fori_loop(0, walk.tiling.run, emit, entering, unroll=_unroll())


def _backward_kernel(tiling: _Tiling, from_last: bool, *refs):
    g_in, decay_in, x_in, entering, g_final, *others = _grouped(refs, tiling.planes)
    dx, d_decay, d_initial, state, A, b, g, decay, h_state, h_A, h = others
    n = pl.program_id(2)
    walk = _Walk(tiling, from_last, n)
    zero, one = _constants(tiling.planes)

    @pl.when(n == 0)
    def _():
        _to_columns(state, g_final)

    # The chunk's h again, from the state that enters it, in the direction of the forward pass.
    _to_columns(g, g_in)
    _to_columns(decay, decay_in)
    _to_columns(h, x_in)
    _to_columns(h_state, entering)
    _states(_Walk(tiling, not from_last, tiling.chunks - 1 - n), decay, h, h_A, b, h_state)

    def inputs(i):
        return _conjugate(walk.tokens(decay, i, one)), walk.tokens(g, i, zero)

    def extend(i, carry):
        # (a, g) after (A, b): c -> a (A c + b + g)
        (A, b), (a, g) = carry, inputs(i)
        return _times(a, A), _times(a, _plus(g, b))

    def emit(i, c, previous=None):
        a, g_i = inputs(i)
        # l_t = g_t + c_t; dx_t = l_t in place of g, da_t = l_t h_{t-1} in place of the decay.
        l = _plus(g_i, c)
        if previous is None:
            previous = walk.read(h, i + 1)
        walk.put(g, i, l)
        walk.put(decay, i, _times(_conjugate(previous), l))
        return _times(a, l)

    entering = walk.entering(extend, A, b, state)
    last = tiling.run - 1
    # Before the first token of a run stands the state that entered it.
    c = lax.fori_loop(0, last, emit, entering, unroll=_unroll())
    emit(last, c, previous=tuple(ref[...] for ref in h_A))
    _from_columns(dx, g)
    _from_columns(d_decay, decay)

    @pl.when(n == tiling.chunks - 1)
    def _():
        _from_columns(d_initial, state)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Steps through a chunk's 8 runs of consecutive tokens, all runs at once. from_last: whether
    chunks, runs and tokens come in reverse. chunk: its number in that order."""

    tiling: _Tiling
    from_last: bool
    chunk: jax.Array

    def _token(self, i):
        return self.tiling.run - 1 - i if self.from_last else i

    def _rows(self, i):
        return pl.ds(self._token(i), RUNS, stride=self.tiling.run + GAP)

    def read(self, refs, i):
        """Reads the i-th token of each of a chunk's 8 runs, in the order of the walk."""
        return tuple(ref[:, self._rows(i), :] for ref in refs)

    def tokens(self, refs, i, otherwise):
        """Reads the i-th token of each of a chunk's 8 runs; `otherwise` for padding beyond T."""
        found = self.read(refs, i)
        tiling = self.tiling
        if tiling.T % tiling.C == 0:
            return found
        chunk = tiling.chunks - 1 - self.chunk if self.from_last else self.chunk
        run = lax.broadcasted_iota(jnp.int32, found[0].shape, 1)
        inside = chunk * tiling.C + run * tiling.run + self._token(i) < tiling.T
        return tuple(jnp.where(inside, z, o) for z, o in zip(found, otherwise))

    def put(self, refs, i, values):
        for ref, z in zip(refs, values):
            ref[:, self._rows(i), :] = z

    def entering(self, extend, A, b, state):
        """Returns the states that enter a chunk's 8 runs of tokens, and stores them in A. extend:
        adds i-th tokens to the runs' maps (A, b). state: enters, then leaves the chunk."""
        zero, one = (
            tuple(jnp.full(A[0].shape, z) for z in c) for c in _constants(self.tiling.planes)
        )
        maps = lax.fori_loop(0, self.tiling.run, extend, (one, zero), unroll=_unroll())
        for refs, values in zip((A, b), maps):
            for ref, z in zip(refs, values):
                ref[...] = z
        carried = tuple(ref[...] for ref in state)
        for s in reversed(range(RUNS)) if self.from_last else range(RUNS):
            row = slice(s, s + 1)
            A_s, b_s = (tuple(ref[:, row] for ref in refs) for refs in (A, b))
            for ref, z in zip(A, carried):
                ref[:, row] = z
            carried = _plus(_applied(A_s, carried), b_s)
        for ref, z in zip(state, carried):
            ref[...] = z
        return tuple(ref[...] for ref in A)


def _unroll() -> int:
    return 1 if devices.interpreting() else UNROLL


def _grouped(refs, planes: int):
    return [refs[i : i + planes] for i in range(0, len(refs), planes)]


def _to_columns(columns, blocks) -> None:
    """Copies blocks (b, rows, d) to scratch arrays (b * d / LANES, rows, LANES), in float32. There,
    GAP unused rows lie between a chunk's 8 runs of tokens."""
    for to, source in zip(columns, blocks):
        for row, lanes, column in _places(source.shape):
            for here, there in _runs(source.shape[1]):
                to[column, there] = source[row, here, lanes].astype(jnp.float32)


def _from_columns(blocks, columns) -> None:
    for to, source in zip(blocks, columns):
        for row, lanes, column in _places(to.shape):
            for here, there in _runs(to.shape[1]):
                to[row, here, lanes] = source[column, there].astype(to.dtype)


def _runs(rows: int):
    """Lists per run of tokens (rows in a block, rows in a scratch array); one row is one run."""
    if rows == 1:
        return [(slice(0, 1), slice(0, 1))]
    run = rows // RUNS
    starts = [(s * run, s * (run + GAP)) for s in range(RUNS)]
    return [(slice(i, i + run), slice(j, j + run)) for i, j in starts]


def _places(shape):
    """Yields (row of the batch, lanes of the block, index in scratch) per 128 channels."""
    b, _, d = shape
    width = d // LANES
    for column in range(b * width):
        first = column % width * LANES
        yield column // width, slice(first, first + LANES), column


def _constants(planes: int):
    """Returns 0 and 1 as tuples of planes (real, and imaginary if there are two)."""
    return (0.0,) * planes, (1.0, 0.0)[:planes]


def _conjugate(x):
    return (x[0], *(-p for p in x[1:]))


def _times(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _applied(A, state):
    """Computes A times a state; 0 where the state is 0, even if A has overflowed."""
    some = functools.reduce(jnp.logical_or, (z != 0.0 for z in state))
    return tuple(jnp.where(some, z, 0.0) for z in _times(A, state))


def _plus(x, y):
    return tuple(p + q for p, q in zip(x, y))
