"""The short causal convolution, its activation and norm as Mosaic TPU kernels: one pass over HBM, forward and backward.

The grid is (rows of the batch, chunks of time, channels). Forward, x is read and y written. Backward, x and the gradient
of y are read, everything is computed again, and dx is written; time runs backwards, so that the gradients of the next
tokens' sums, dz, are in VMEM when dx_t = sum_j w_{I-1-j} dz_{t+j} needs them. The gradients of w and bias are sums in VMEM.
The inputs before a chunk are a block of 16 tokens of x of its own.

Tokens lie along sublanes, where a shift by one costs several operations in registers; but from memory that is 128
channels wide, 8 tokens are loaded in one from any row. So the tokens of a chunk are first copied to such columns, in float32.
Two tokens of bfloat16 share a sublane's word, and are taken apart by a shift and a mask: even tokens become one
column, odd ones another ("parts"), which also halves the different loads of a tap. Results go back the same way.

silu(z) is h + h tanh(h), h = z/2; `pallas_tpu` halves w and bias for it. Its derivative by h is u (1 + h (1 - tanh h)),
u = 1 + tanh h. Of the norm y = a r, r = (sum a^2 + eps)^(-1/2) a head, it is da = r (g - a r^2 sum g a). Sums over a head's
lanes that are no 128 are a product with zeros and ones.

Documents: `age` counts the inputs before a token that its taps may reach, and `room` the tokens behind it whose taps reach it,
both cut at I-1 and written 128 times side by side. A tap of lag j counts where age >= j.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import targets, tpu_blocks, tuning
from kernels_pallas.causal_conv import reference

LANES, ROWS = 128, 8  # of a register
HALO = 16  # tokens: the shortest block of bfloat16
SUM_ROWS = 64  # rows whose head sums are taken together
WIDEST = 1024  # channels that heads may take to fill whole registers
VMEM_BYTES = 40 << 20  # what a kernel may take: every part has 64 MiB a core, or more
# Where `tuned.json` says nothing else: tokens and channels of a block.
SIZES = {"chunk_size": 512, "width": 512}


def unsupported(x_BTD, w, bias, initial_state, start_BT, finish) -> str | None:
    """Why the kernel cannot run this call, or None."""
    for name, array in (("x", x_BTD), ("w", w)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}; it takes float32 and bfloat16 ('shifted' takes all)"
    if w.shape[0] > HALO + 1:
        return f"the width is {w.shape[0]}; it takes up to {HALO + 1} ('shifted' takes any)"
    plan = Plan.of(x_BTD, w, bias, start_BT, finish)
    if plan.group * LANES > WIDEST:
        return (
            f"heads of {plan.K} channels fill registers of {LANES} only in groups of {plan.group * LANES} channels; it takes "
            f"groups of up to {WIDEST}, such as divisors and multiples of {LANES} need"
        )
    if plan.vmem_bytes > VMEM_BYTES:
        return (
            f"{plan.D} channels take {plan.vmem_bytes >> 20} MiB of VMEM, of {VMEM_BYTES >> 20}; give it fewer at a time"
        )
    return None


def pallas_tpu(x_BTD, w, bias, initial_state, start_BT, finish):
    """Same contract as `reference.recurrent`."""
    plan = Plan.of(x_BTD, w, bias, start_BT, finish)
    if bias is not None:
        w = jnp.concatenate([w.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    w = w.astype(jnp.float32) * (0.5 if plan.silu else 1.0)
    w = jnp.pad(w, ((0, 0), (0, plan.all_channels - plan.D)))
    return _conv(plan, x_BTD, w, initial_state, start_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(plan, x_BTD, w, initial_state, start_BT):
    """w: float32, with the bias below the taps, and silu's half in both."""
    return _forward(plan, x_BTD, w, initial_state, start_BT)[0]


def _forward(plan, x_BTD, w, initial_state, start_BT):
    (y_BTD,) = _call(
        plan,
        _forward_kernel,
        [*_inputs(x_BTD, w, initial_state), *_marks(plan, start_BT, x_BTD.dtype)[:1]],
        [(x_BTD, "time")],
        [plan.halo + plan.rows, *([plan.rows] if plan.K else [])],
    )
    tail = reference.tail(x_BTD, initial_state, start_BT)
    return (y_BTD, tail), (x_BTD, w, initial_state, start_BT)


def _backward(plan, saved, gradients):
    x_BTD, w, initial_state, start_BT = saved
    g_BTD, g_tail = gradients
    first = (plan.B, plan.p, plan.halo, plan.all_channels)
    dx_BTD, dw, dz = _call(
        plan,
        _backward_kernel,
        [*_inputs(x_BTD, w, initial_state), *_marks(plan, start_BT, x_BTD.dtype), (g_BTD, "time")],
        [
            (x_BTD, "time"),
            (jax.ShapeDtypeStruct(w.shape, jnp.float32), "sum"),
            (jax.ShapeDtypeStruct(first, jnp.float32), "first"),
        ],
        [plan.halo + plan.rows, plan.rows + plan.halo, *([plan.rows] * 2 if plan.K else [])],
    )
    dz_BSD = jnp.moveaxis(dz, 1, 2).reshape(plan.B, HALO, -1)[..., : plan.D]
    _, tail_vjp = jax.vjp(lambda x, z: reference.tail(x, z, start_BT), x_BTD, initial_state)
    dx_tail, d_initial = tail_vjp(g_tail)
    last = max(plan.T - (plan.width - 1), 0)  # none before it
    dx_BTD = dx_BTD.at[:, last:].add(dx_tail[:, last:])
    d_initial = d_initial + _initial_gradient(plan, dz_BSD, w, start_BT).astype(d_initial.dtype)
    return dx_BTD, dw, d_initial, None


_conv.defvjp(_forward, _backward)


def _inputs(x_BTD, w, initial_state):
    """What both kernels read first."""
    missing = HALO - initial_state.shape[1]
    initial_BSD = jnp.pad(initial_state, ((0, 0), (missing, 0), (0, 0)))
    return (x_BTD, "time"), (x_BTD, "before"), (initial_BSD, "initial"), (w, "w")


def _marks(plan, start_BT, dtype):
    """`age` and `room` (see the top of the file), (B, T, LANES), or nothing."""
    if start_BT is None:
        return []
    T = start_BT.shape[1]

    def counted(starts_at):
        """Tokens until `starts_at(j)` first says that a document starts between a token and the one j from it."""
        count_BT, going_BT = jnp.zeros(start_BT.shape, dtype), True
        for j in range(1, plan.width):
            going_BT = going_BT & ~starts_at(j)
            count_BT = count_BT + going_BT.astype(dtype)
        return jnp.broadcast_to(count_BT[..., None], (*start_BT.shape, LANES)), "mark"

    return [
        counted(lambda j: jnp.pad(start_BT, ((0, 0), (j - 1, 0)))[:, :T]),
        counted(lambda j: jnp.pad(start_BT, ((0, 0), (0, j)))[:, j:]),
    ]


def _initial_gradient(plan, dz_BSD, w, start_BT):
    """Of the initial state, from dz of the first HALO tokens."""
    n = plan.width - 1
    if start_BT is not None:
        start_BS = jnp.pad(start_BT, ((0, 0), (0, HALO)))[:, :HALO]
        (age_BSL, _), _ = _marks(plan, start_BS, jnp.float32)
    gradient = jnp.zeros((plan.B, n, plan.D))
    for j in range(1, plan.width):
        kept = dz_BSD if start_BT is None else jnp.where(age_BSL[..., :1] >= j, dz_BSD, 0)
        reached = kept[:, :j] * w[n - j, : plan.D][None, None]
        gradient = gradient + jnp.pad(reached, ((0, 0), (n - j, 0), (0, 0)))
    return gradient


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes. A block is C tokens of d channels. p tokens share a word of 32 bits. `group` columns of LANES channels hold
    whole heads of K, and are worked on together."""

    B: int
    T: int
    D: int
    width: int
    bias: bool
    packed: bool
    silu: bool
    K: int | None
    eps: float
    p: int
    C: int
    d: int
    group: int

    @classmethod
    def of(cls, x_BTD, w, bias, start_BT, finish):
        B, T, D = x_BTD.shape
        K = None if finish.heads is None else D // finish.heads
        group = 1 if K is None else math.lcm(K, LANES) // LANES
        sizes = tuning.lookup(SIZES, "causal_conv", "pallas_tpu", str(x_BTD.dtype), str(D))
        groups, most = pl.cdiv(D, group * LANES), max(1, sizes["width"] // (group * LANES))
        n = min(range(min(groups, most), 0, -1), key=lambda n: pl.cdiv(groups, n) * n)
        C = min(sizes["chunk_size"], pl.cdiv(T, 2 * ROWS) * 2 * ROWS)
        flags = (bias is not None, start_BT is not None, finish.activation == "silu")
        p = 4 // x_BTD.dtype.itemsize
        return cls(B, T, D, w.shape[0], *flags, K, finish.eps, p, C, n * group * LANES, group)

    @property
    def chunks(self):
        return pl.cdiv(self.T, self.C)

    @property
    def blocks(self):
        return pl.cdiv(self.D, self.d)

    @property
    def all_channels(self):
        return self.blocks * self.d

    @property
    def rows(self):
        """Of words, in a block."""
        return self.C // self.p

    @property
    def halo(self):
        return HALO // self.p

    @property
    def vmem_bytes(self):
        """What the backward kernel takes: blocks twice, for they are fetched ahead; columns; what stays for all time."""
        item = 4 // self.p
        blocks = item * (3 * self.C * self.d + 2 * HALO * self.d + 2 * self.C * LANES)
        blocks += 4 * self.all_channels * (HALO + pl.cdiv(self.width + 1, ROWS) * ROWS)
        columns = 4 * LANES * self.group * (self.C + HALO) * (4 if self.K else 2)
        return 2 * blocks + columns + 4 * HALO * self.all_channels

    def spec(self, kind: str, array, backward: bool):
        """The window of a block on an array. backward: the grid begins at the last chunk."""

        def chunk(t):
            return self.chunks - 1 - t if backward else t

        def before(t):
            return jnp.maximum(chunk(t) * (self.C // HALO) - 1, 0)

        shape, index = {
            "time": ((1, self.C, self.d), lambda b, t, k: (b, chunk(t), k)),
            "before": ((1, HALO, self.d), lambda b, t, k: (b, before(t), k)),
            "initial": ((1, HALO, self.d), lambda b, t, k: (b, 0, k)),
            "w": ((array.shape[0], self.d), lambda b, t, k: (0, k)),
            "mark": ((1, self.C, LANES), lambda b, t, k: (b, chunk(t), 0)),
            "sum": (array.shape, lambda b, t, k: (0, 0)),
            "first": ((1, *array.shape[1:]), lambda b, t, k: (b, 0, 0, 0)),
        }[kind]
        return pl.BlockSpec(shape, index)


def _call(plan: Plan, kernel, inputs, outputs, columns):
    """One pass of `kernel` over `inputs`, (array, kind) each; outputs likewise. columns: how many rows each has."""
    backward = kernel is _backward_kernel
    scratch = [pltpu.VMEM((plan.p, plan.group, rows, LANES), jnp.float32) for rows in columns]
    if backward:
        later = (plan.all_channels // LANES, plan.p, plan.halo, LANES)
        scratch.append(pltpu.VMEM(later, jnp.float32))
    order = "arbitrary" if backward else "parallel"
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.B, plan.chunks, plan.blocks),
        in_specs=[plan.spec(kind, array, backward) for array, kind in inputs],
        out_specs=[plan.spec(kind, array, backward) for array, kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(order,) * 3, vmem_limit_bytes=VMEM_BYTES + (8 << 20)
        ),
        interpret=targets.interpreting(),
        name=f"causal_conv{kernel.__name__.removesuffix('_kernel')}",
    )(*(array for array, _ in inputs))


def _forward_kernel(plan, x, before, initial, w, *refs):
    age, (y, seen, *held) = (refs[0] if plan.packed else None), refs[plan.packed :]
    chunk, block = pl.program_id(1), pl.program_id(2)

    def group(column):
        at = _Group(plan, chunk, block, column, w, seen, age)
        at.take(x, before, initial)

        def sums(row, _):
            taps = at.taps(row)
            for c in range(plan.group):
                a = [at.activated(h)[0] for h in at.sums(taps, c)]
                if plan.K is None:
                    at.write(y, c, row, a)
                else:
                    at.hold(held[0], c, row, a)

        def norm(row, _):
            a = at.held(held[0], row)
            r = at.inverse_norms(a)
            for c in range(plan.group):
                at.write(y, c, row, [a[q][c] * r[q][c] for q in range(plan.p)])

        _each(plan.rows, ROWS, sums)
        if plan.K is not None:
            _each(plan.rows, _together(plan), norm)

    _each_group(plan, group)


def _backward_kernel(plan, x, before, initial, w, *refs):
    marks, refs = refs[: 2 * plan.packed], refs[2 * plan.packed :]
    age, room = marks or (None, None)
    g, dx, dw, first, seen, dz, *held, later = refs
    b, t, block = (pl.program_id(axis) for axis in range(3))
    chunk = plan.chunks - 1 - t

    @pl.when((b == 0) & (t == 0) & (block == 0))
    def _():
        dw[...] = jnp.zeros(dw.shape, jnp.float32)

    def group(column):
        at = _Group(plan, chunk, block, column, w, seen, age)
        at.take(x, before, initial)
        nth = block * (plan.d // LANES) + column
        for c in range(plan.group):
            dz[:, c, plan.rows :] = jnp.where(t == 0, 0.0, later[nth + c])

        def sums(row, totals):
            taps, g_here = at.taps(row), at.read(g, row, ROWS)
            for c in range(plan.group):
                a, slope = zip(*(at.activated(h) for h in at.sums(taps, c)))
                if plan.K is None:
                    dh = [_times(s, g_here[q][c]) for q, s in enumerate(slope)]
                    at.hold(dz, c, row, dh)
                    totals = at.with_products(totals, taps, c, dh)
                else:
                    at.hold(held[0], c, row, a)
                    at.hold(held[1], c, row, slope)
            return totals

        def norm(row, _):
            a, slope, g_here = at.held(held[0], row), at.held(held[1], row), at.read(g, row, _together(plan))
            r = at.inverse_norms(a)
            along = at.head_sums(a, g_here)
            for c in range(plan.group):
                dh = []
                for q in range(plan.p):
                    da = r[q][c] * (g_here[q][c] - a[q][c] * (r[q][c] * r[q][c] * along[q][c]))
                    dh.append(da * slope[q][c] if plan.silu else da)
                at.hold(dz, c, row, dh)

        def products(row, totals):
            taps = at.taps(row)
            for c in range(plan.group):
                dh = [dz[q, c, pl.ds(row, ROWS)] for q in range(plan.p)]
                totals = at.with_products(totals, taps, c, dh)
            return totals

        totals = [jnp.zeros((ROWS, LANES), jnp.float32)] * (plan.group * w.shape[0])
        totals = _each(plan.rows, ROWS, sums, totals)
        if plan.K is not None:
            _each(plan.rows, _together(plan), norm)
            totals = _each(plan.rows, ROWS, products, totals)
        for c in range(plan.group):
            channels = pl.ds(pl.multiple_of((nth + c) * LANES, LANES), LANES)
            for i in range(w.shape[0]):
                total = totals[c * w.shape[0] + i]
                dw[i : i + 1, channels] += jnp.sum(total, axis=0, keepdims=True)
            later[nth + c] = dz[:, c, : plan.halo]
            first[0, :, :, channels] = dz[:, c, : plan.halo]
        _each(plan.rows, ROWS, lambda row, _: at.write_dx(dx, dz, room, row))

    _each_group(plan, group)


def _each(rows: int, step: int, body, carry=None):
    """body(row, carry) for every `step`th row: straight code, so that the compiler can fill each one's gaps."""
    steps = rows // step
    unroll = 1 if targets.interpreting() else steps
    return lax.fori_loop(0, steps, lambda i, z: body(i * step, z), carry, unroll=unroll)


def _each_group(plan, body) -> None:
    def one(i, _):
        body(i * plan.group)

    lax.fori_loop(0, plan.d // (plan.group * LANES), one, None)


def _together(plan) -> int:
    """Rows whose head sums are taken at a time."""
    return next(n for n in range(SUM_ROWS, 0, -ROWS) if plan.rows % n == 0)


def _times(slope, g):
    return g if slope is None else slope * g


class _Group:
    """`group` columns of a block, and what is done to them. Values are lists over parts, and columns within."""

    def __init__(self, plan, chunk, block, column, w, seen, age):
        self.plan, self.chunk, self.block, self.column = plan, chunk, block, column
        self.seen, self.age = seen, age
        rows = range(w.shape[0])
        self.w = [
            [jnp.broadcast_to(w[i : i + 1, self.lanes(c)], (ROWS, LANES)) for i in rows]
            for c in range(plan.group)
        ]

    def lanes(self, c):
        return pl.ds(pl.multiple_of((self.column + c) * LANES, LANES), LANES)

    def take(self, x, before, initial) -> None:
        """x to columns, behind the tokens before it."""
        plan = self.plan
        for c in range(plan.group):
            earlier = self._parts(before[0, :, self.lanes(c)])
            entering = self._parts(initial[0, :, self.lanes(c)])
            here = self._parts(x[0, :, self.lanes(c)])
            for q in range(plan.p):
                halo = jnp.where(self.chunk == 0, entering[q], earlier[q])
                self.seen[q, c, : plan.halo] = self._inside(halo, q, c, timed=False)
                self.seen[q, c, plan.halo :] = self._inside(here[q], q, c)

    def read(self, ref, row, rows):
        """[part][column] of a block."""
        p = self.plan.p
        found = []
        for c in range(self.plan.group):
            words = ref[0, pl.ds(_aligned(row * p, p * ROWS), rows * p), self.lanes(c)]
            found.append([self._inside(z, q, c, row) for q, z in enumerate(self._parts(words))])
        return [list(z) for z in zip(*found)]

    def _parts(self, words):
        if self.plan.p == 1:
            return [words]
        words = pltpu.bitcast(words, jnp.int32)
        both = words << 16, words & jnp.int32(-(1 << 16))
        return [lax.bitcast_convert_type(z, jnp.float32) for z in both]

    def _inside(self, z, q, c, row=0, timed=True):
        """Zero beyond the ends of time and channels, where it would do harm."""
        plan, inside = self.plan, None
        if timed and plan.T % plan.C:
            token = (row + tpu_blocks.iota(z.shape, 0)) * plan.p + q
            inside = token < plan.T - self.chunk * plan.C
        if plan.K is not None and plan.D % (plan.group * LANES):
            channel = self.block * plan.d + (self.column + c) * LANES
            own = tpu_blocks.iota(z.shape, 1) < plan.D - channel
            inside = own if inside is None else inside & own
        return z if inside is None else jnp.where(inside, z, 0.0)

    def write(self, ref, c, row, parts) -> None:
        p, rows, z = self.plan.p, parts[0].shape[0], parts[0]
        if p == 2:
            if targets.interpreting():  # which knows neither of the two below
                z, row, rows = jnp.stack(parts, axis=1), row * p, rows * p
                z = z.reshape(rows, LANES).astype(jnp.bfloat16)
            else:  # a store of words takes them as they are; one of bfloat16 splits them first
                z = pltpu.pack_elementwise(parts, packed_dtype=jnp.bfloat16)
                ref = ref.bitcast(jnp.uint32)
        ref[0, pl.ds(_aligned(row, ROWS), rows), self.lanes(c)] = z

    def hold(self, ref, c, row, parts) -> None:
        for q, z in enumerate(parts):
            if z is not None:
                ref[q, c, pl.ds(_aligned(row, ROWS), z.shape[0])] = z

    def held(self, ref, row):
        plan = self.plan
        rows = pl.ds(_aligned(row, ROWS), _together(plan))
        return [[ref[q, c, rows] for c in range(plan.group)] for q in range(plan.p)]

    def _marked(self, ref, row):
        """[part][lag]: whether the tap counts."""
        plan = self.plan
        if ref is None:
            return None
        words = ref[0, pl.ds(_aligned(row * plan.p, plan.p * ROWS), ROWS * plan.p)]
        return [[count >= j for j in range(plan.width)] for count in self._parts(words)]

    def taps(self, row):
        """[part][column][lag], zero where the tap lies in another document."""
        return self._shifted(self.seen, row + self.plan.halo, -1, self._marked(self.age, row))

    def _shifted(self, ref, row, sign, counts):
        plan, loaded = self.plan, {}

        def load(q, c, lag):
            rows, part = divmod(q + sign * lag, plan.p)
            key = part, c, rows
            if key not in loaded:
                loaded[key] = ref[part, c, pl.ds(row + rows, ROWS)]
            z = loaded[key]
            return z if counts is None or lag == 0 else jnp.where(counts[q][lag], z, 0.0)

        return [
            [[load(q, c, lag) for lag in range(plan.width)] for c in range(plan.group)]
            for q in range(plan.p)
        ]

    def _weighted(self, taps, c):
        n = self.plan.width - 1
        total = self.w[c][n] * taps[0]
        for lag in range(1, n + 1):
            total = total + self.w[c][n - lag] * taps[lag]
        return total

    def sums(self, taps, c):
        """h of each part."""
        h = [self._weighted(taps[q][c], c) for q in range(self.plan.p)]
        return [z + self.w[c][self.plan.width] for z in h] if self.plan.bias else h

    def activated(self, h):
        """The activation, and its derivative (None: 1)."""
        if not self.plan.silu:
            return h, None
        t = jnp.tanh(h)
        a = h + h * t
        return a, (1.0 + t) * (1.0 + (h - h * t))

    def with_products(self, totals, taps, c, dh):
        """The sums for w and bias, with those of these tokens."""
        plan, totals = self.plan, list(totals)
        for q in range(plan.p):
            for lag in range(plan.width):
                i = c * len(self.w[c]) + plan.width - 1 - lag
                totals[i] = totals[i] + dh[q] * taps[q][c][lag]
            if plan.bias:
                i = c * len(self.w[c]) + plan.width
                totals[i] = totals[i] + dh[q]
        return totals

    def write_dx(self, ref, dz, room, row) -> None:
        later = self._shifted(dz, row, 1, self._marked(room, row))
        for c in range(self.plan.group):
            parts = [self._weighted(later[q][c], c) for q in range(self.plan.p)]
            self.write(ref, c, row, parts)

    def inverse_norms(self, a):
        return [[lax.rsqrt(s + self.plan.eps) for s in sums] for sums in self.head_sums(a, a)]

    def head_sums(self, x, y):
        """[part][column] of the sums of x y over each head, for each of its channels."""
        plan = self.plan
        products = [[z * s for z, s in zip(*columns)] for columns in zip(x, y)]
        if plan.K % LANES == 0:
            return [[tpu_blocks.row_sums(sum(z[1:], start=z[0]))] * plan.group for z in products]
        N = plan.group * LANES
        head = tuple(tpu_blocks.iota((N, N), axis) // plan.K for axis in (0, 1))
        ones = (head[0] == head[1]).astype(jnp.float32).astype(jnp.bfloat16)
        terms = 3 if plan.p == 1 else 2
        results = []
        for columns in products:
            z = jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]
            z = tpu_blocks.Products(narrow=True).dot(z, ones, terms=terms)
            results.append([z[:, c * LANES : (c + 1) * LANES] for c in range(plan.group)])
        return results


def _aligned(row, step):
    return pl.multiple_of(row, step)
