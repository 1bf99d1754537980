"""Bodies of the TPU kernels of `causal_conv`; the docstring of `launch.py` explains their names."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import devices
from kernels_pallas.tpu import primitives

LANES, ROWS = 128, 8  # of a register
SUM_ROWS = 64  # rows whose head sums are taken together


def forward(tiling, x, before, initial, w, *refs):
    """Computes y of one block: convolution, bias, activation, and the L2 norm of each head. x: the
    block. before, initial: the tokens before it, in x or in the initial state. w: taps and bias."""
    age, (y, seen, *columns) = (refs[0] if tiling.packed else None), refs[tiling.packed :]
    chunk, block = pl.program_id(1), pl.program_id(2)

    def group(column):
        at = Group(tiling, chunk, block, column, w, seen, age)
        at.take(x, before, initial)

        def sums(row, _):
            # z = bias + sum_i w_i x_{t-(I-1)+i}, and a = its activation
            taps = at.taps(row)
            for c in range(tiling.group):
                a = [at.activated(h)[0] for h in at.sums(taps, c)]
                if tiling.K is None:
                    at.write(y, c, row, a)
                else:
                    at.store(columns[0], c, row, a)

        def norm(row, _):
            # y = a r
            a = at.load(columns[0], row)
            r = at.inverse_norms(a)
            for c in range(tiling.group):
                at.write(y, c, row, [a[q][c] * r[q][c] for q in range(tiling.p)])

        _each(tiling.rows, ROWS, sums)
        if tiling.K is not None:
            _each(tiling.rows, _together(tiling), norm)

    _each_group(tiling, group)


def backward(tiling, x, before, initial, w, *refs):
    """Computes dx of one block, and adds the block's terms to the gradients of w and bias. Inputs
    are those of `forward`, and g, the gradient of y."""
    marks, refs = refs[: 2 * tiling.packed], refs[2 * tiling.packed :]
    age, room = marks or (None, None)
    g, dx, dw, first, seen, dz, *columns, later = refs
    b, t, block = (pl.program_id(axis) for axis in range(3))
    chunk = tiling.chunks - 1 - t

    @pl.when((b == 0) & (t == 0) & (block == 0))
    def _():
        dw[...] = jnp.zeros(dw.shape, jnp.float32)

    def group(column):
        at = Group(tiling, chunk, block, column, w, seen, age)
        at.take(x, before, initial)
        nth = block * (tiling.d // LANES) + column
        # dz of the tokens after this block, which the grid has visited before.
        for c in range(tiling.group):
            dz[:, c, tiling.rows :] = jnp.where(t == 0, 0.0, later[nth + c])

        def sums(row, totals):
            # The forward pass again; without a norm dz = g * the activation's slope, and dw.
            taps, g_here = at.taps(row), at.read(g, row, ROWS)
            for c in range(tiling.group):
                a, slope = zip(*(at.activated(h) for h in at.sums(taps, c)))
                if tiling.K is None:
                    dh = [
                        g_here[q][c] if s is None else s * g_here[q][c] for q, s in enumerate(slope)
                    ]
                    at.store(dz, c, row, dh)
                    totals = at.with_products(totals, taps, c, dh)
                else:
                    at.store(columns[0], c, row, a)
                    at.store(columns[1], c, row, slope)
            return totals

        def norm(row, _):
            # da = r (g - a r^2 sum g a), and dz = da * slope
            a, slope = (at.load(ref, row) for ref in columns)
            g_here = at.read(g, row, _together(tiling))
            r = at.inverse_norms(a)
            along = at.head_sums(a, g_here)
            for c in range(tiling.group):
                dh = []
                for q in range(tiling.p):
                    da = r[q][c] * (g_here[q][c] - a[q][c] * (r[q][c] * r[q][c] * along[q][c]))
                    dh.append(da * slope[q][c] if tiling.silu else da)
                at.store(dz, c, row, dh)

        def products(row, totals):
            # dw_i = sum_t dz_t x_{t-(I-1)+i}
            taps = at.taps(row)
            for c in range(tiling.group):
                dh = [dz[q, c, pl.ds(row, ROWS)] for q in range(tiling.p)]
                totals = at.with_products(totals, taps, c, dh)
            return totals

        totals = [jnp.zeros((ROWS, LANES), jnp.float32)] * (tiling.group * w.shape[0])
        totals = _each(tiling.rows, ROWS, sums, totals)
        if tiling.K is not None:
            _each(tiling.rows, _together(tiling), norm)
            totals = _each(tiling.rows, ROWS, products, totals)
        # Totals of this block join dw; its first dz stay for the block before it in time.
        for c in range(tiling.group):
            channels = pl.ds(pl.multiple_of((nth + c) * LANES, LANES), LANES)
            for i in range(w.shape[0]):
                total = totals[c * w.shape[0] + i]
                dw[i : i + 1, channels] += jnp.sum(total, axis=0, keepdims=True)
            later[nth + c] = dz[:, c, : tiling.halo]
            first[0, :, :, channels] = dz[:, c, : tiling.halo]
        # dx_t = sum_j w_{I-1-j} dz_{t+j}
        _each(tiling.rows, ROWS, lambda row, _: at.write_dx(dx, dz, room, row))

    _each_group(tiling, group)


def _each(rows: int, step: int, body, carry=None):
    """Runs body(row, carry) for every `step`th row, unrolled to let the compiler overlap rows."""
    steps = rows // step
    unroll = 1 if devices.interpreting() else steps
    return lax.fori_loop(0, steps, lambda i, z: body(i * step, z), carry, unroll=unroll)


def _each_group(tiling, body) -> None:
    """Runs body(first) for each group of 128-channel columns of a block, by its first column."""

    def one(i, _):
        body(i * tiling.group)

    lax.fori_loop(0, tiling.d // (tiling.group * LANES), one, None)


def _together(tiling) -> int:
    """Returns the number of rows for which sums over heads are computed at a time."""
    return next(n for n in range(SUM_ROWS, 0, -ROWS) if tiling.rows % n == 0)


class Group:
    """Steps of the convolution on `tiling.group` columns of a block, 128 channels each.

    A 32-bit word holds one float32 or two bfloat16 tokens. Values are lists [part][column] of
    arrays (rows, 128), where part p holds the p-th token of every word. row: the first row worked
    on.
    """

    def __init__(self, tiling, chunk, block, column, w, seen, age):
        self.tiling, self.chunk, self.block, self.column = tiling, chunk, block, column
        self.seen, self.age = seen, age
        rows = range(w.shape[0])
        self.w = [
            [jnp.broadcast_to(w[i : i + 1, self.lanes(c)], (ROWS, LANES)) for i in rows]
            for c in range(tiling.group)
        ]

    def lanes(self, c):
        return pl.ds(pl.multiple_of((self.column + c) * LANES, LANES), LANES)

    def take(self, x, before, initial) -> None:
        """Copies the block x, and the tokens before it, as float32 to the scratch array `seen`.
        before, initial: those tokens, from x or, at the first chunk, from the initial state."""
        tiling = self.tiling
        for c in range(tiling.group):
            earlier = self._parts(before[0, :, self.lanes(c)])
            entering = self._parts(initial[0, :, self.lanes(c)])
            here = self._parts(x[0, :, self.lanes(c)])
            for q in range(tiling.p):
                halo = jnp.where(self.chunk == 0, entering[q], earlier[q])
                self.seen[q, c, : tiling.halo] = self._inside(halo, q, c, timed=False)
                self.seen[q, c, tiling.halo :] = self._inside(here[q], q, c)

    def read(self, ref, row, rows):
        """Reads `rows` rows of an input block in float32, as lists [token of a word][column]."""
        p = self.tiling.p
        found = []
        for c in range(self.tiling.group):
            words = ref[0, pl.ds(_aligned(row * p, p * ROWS), rows * p), self.lanes(c)]
            found.append([self._inside(z, q, c, row) for q, z in enumerate(self._parts(words))])
        return [list(z) for z in zip(*found)]

    def _parts(self, words):
        """Splits an array of 32-bit words into float32 arrays, one per token of a word."""
        if self.tiling.p == 1:
            return [words]
        words = pltpu.bitcast(words, jnp.int32)
        both = words << 16, words & jnp.int32(-(1 << 16))
        return [lax.bitcast_convert_type(z, jnp.float32) for z in both]

    def _inside(self, z, q, c, row=0, timed=True):
        """Zeroes z at padding tokens and channels of the block, where they would change a result.
        q, c, row: token of a word, column, first row of z. timed: whether z may reach beyond T."""
        tiling, inside = self.tiling, None
        if timed and tiling.T % tiling.C:
            token = (row + primitives.iota(z.shape, 0)) * tiling.p + q
            inside = token < tiling.T - self.chunk * tiling.C
        if tiling.K is not None and tiling.D % (tiling.group * LANES):
            channel = self.block * tiling.d + (self.column + c) * LANES
            own = primitives.iota(z.shape, 1) < tiling.D - channel
            inside = own if inside is None else inside & own
        return z if inside is None else jnp.where(inside, z, 0.0)

    def write(self, ref, c, row, parts) -> None:
        """Writes column c to an output block in its dtype; parts: one array per token of a word."""
        p, rows, z = self.tiling.p, parts[0].shape[0], parts[0]
        if p == 2:
            if devices.interpreting():  # which knows neither of the two below
                z, row, rows = jnp.stack(parts, axis=1), row * p, rows * p
                z = z.reshape(rows, LANES).astype(jnp.bfloat16)
            else:  # a store of words takes them as they are; one of bfloat16 splits them first
                z = pltpu.pack_elementwise(parts, packed_dtype=jnp.bfloat16)
                ref = ref.bitcast(jnp.uint32)
        ref[0, pl.ds(_aligned(row, ROWS), rows), self.lanes(c)] = z

    def store(self, ref, c, row, parts) -> None:
        """Stores column c, an array or None (skipped) per token of a word, in the scratch `ref`."""
        for q, z in enumerate(parts):
            if z is not None:
                ref[q, c, pl.ds(_aligned(row, ROWS), z.shape[0])] = z

    def load(self, ref, row):
        """Loads `_together` rows of a scratch array, as lists [token of a word][column]."""
        tiling = self.tiling
        rows = pl.ds(_aligned(row, ROWS), _together(tiling))
        return [[ref[q, c, rows] for c in range(tiling.group)] for q in range(tiling.p)]

    def _marked(self, ref, row):
        """Returns masks [token of a word][lag] of whether the token `lag` away is in the same
        document. ref: counts of such tokens (`age` or `room`); None if there are no documents."""
        tiling = self.tiling
        if ref is None:
            return None
        words = ref[0, pl.ds(_aligned(row * tiling.p, tiling.p * ROWS), ROWS * tiling.p)]
        return [[count >= j for j in range(tiling.width)] for count in self._parts(words)]

    def taps(self, row):
        """Loads the inputs [token of a word][column][lag], 0 where they are of another document."""
        return self._shifted(self.seen, row + self.tiling.halo, -1, self._marked(self.age, row))

    def _shifted(self, ref, row, sign, counts):
        """Loads from scratch the tokens at each lag before (sign -1) or after (1) each token.
        counts: masks, False for 0, or None. Returns [token of a word][column][lag]."""
        tiling, loaded = self.tiling, {}

        def load(q, c, lag):
            rows, part = divmod(q + sign * lag, tiling.p)
            key = part, c, rows
            if key not in loaded:
                loaded[key] = ref[part, c, pl.ds(row + rows, ROWS)]
            z = loaded[key]
            return z if counts is None or lag == 0 else jnp.where(counts[q][lag], z, 0.0)

        return [
            [[load(q, c, lag) for lag in range(tiling.width)] for c in range(tiling.group)]
            for q in range(tiling.p)
        ]

    def _weighted(self, taps, c):
        """Computes sum_lag w_{I-1-lag} taps[lag] of column c: the filter on inputs at each lag."""
        n = self.tiling.width - 1
        total = self.w[c][n] * taps[0]
        for lag in range(1, n + 1):
            total = total + self.w[c][n - lag] * taps[lag]
        return total

    def sums(self, taps, c):
        """Computes z = bias + sum_i w_i x_{t-(I-1)+i} of column c (with silu, h = z/2). Returns one
        array per token of a word."""
        h = [self._weighted(taps[q][c], c) for q in range(self.tiling.p)]
        return [z + self.w[c][self.tiling.width] for z in h] if self.tiling.bias else h

    def activated(self, h):
        """Returns the activation and its derivative at h (None stands for a derivative of 1)."""
        if not self.tiling.silu:
            return h, None
        u = 2.0 / (1.0 + jnp.exp(-2.0 * h))
        return h * u, u * (1.0 + h * (2.0 - u))

    def with_products(self, totals, taps, c, dh):
        """Returns `totals`, the gradients of w and bias so far, with these tokens' terms added. dh:
        the gradient of the filter's output, column c, one array per token of a word."""
        tiling, totals = self.tiling, list(totals)
        for q in range(tiling.p):
            for lag in range(tiling.width):
                i = c * len(self.w[c]) + tiling.width - 1 - lag
                totals[i] = totals[i] + dh[q] * taps[q][c][lag]
            if tiling.bias:
                i = c * len(self.w[c]) + tiling.width
                totals[i] = totals[i] + dh[q]
        return totals

    def write_dx(self, ref, dz, room, row) -> None:
        """Computes dx_t = sum_j w_{I-1-j} dz_{t+j} and writes it to the output block `ref`."""
        later = self._shifted(dz, row, 1, self._marked(room, row))
        for c in range(self.tiling.group):
            parts = [self._weighted(later[q][c], c) for q in range(self.tiling.p)]
            self.write(ref, c, row, parts)

    def inverse_norms(self, a):
        """Computes r = (sum a^2 + eps)^(-1/2) over each head, repeated for each of its channels."""
        return [[lax.rsqrt(s + self.tiling.eps) for s in sums] for sums in self.head_sums(a, a)]

    def head_sums(self, x, y):
        """Sums x y over each head, repeated for its channels, as [token of a word][column]."""
        tiling = self.tiling
        products = [[z * s for z, s in zip(*columns)] for columns in zip(x, y)]
        if tiling.K % LANES == 0:
            return [[primitives.row_sums(sum(z[1:], start=z[0]))] * tiling.group for z in products]
        N = tiling.group * LANES
        head = tuple(primitives.iota((N, N), axis) // tiling.K for axis in (0, 1))
        ones = (head[0] == head[1]).astype(jnp.float32).astype(jnp.bfloat16)
        terms = 3 if tiling.p == 1 else 2
        results = []
        for columns in products:
            z = jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]
            z = primitives.Products(narrow=True).dot(z, ones, terms=terms)
            results.append([z[:, c * LANES : (c + 1) * LANES] for c in range(tiling.group)])
        return results


def _aligned(row, step):
    return pl.multiple_of(row, step)
