"""Triton kernels of the real diagonal recurrence: maps of chunks, states, gradients.

The equations are those of docs/math/diagonal_scan.md. A program walks the C tokens of one chunk for
BD channels. The grid is (chunks times blocks of channels, batch), so all chunks run at once; in
between, `carry` walks the chunks. REVERSE walks time from its end.
"""

import triton
import triton.language as tl


@triton.jit
def _program(T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Returns this program's chunk n and channels d, and their offsets in two kinds of arrays. The
    offsets are those of the batch row's first token in (B, T, D), and of the chunk in (B, N, D)."""
    blocks = tl.cdiv(D, BD)
    n = tl.program_id(0) // blocks + tl.full((BD,), 0, tl.int32)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    b = tl.program_id(1).to(tl.int64)
    return n, d, b * T * D + d, (b * tl.cdiv(T, C) + n) * D + d


@triton.jit
def maps(
    x, decay, product, local,
    T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes the map h -> product h + local that one chunk applies to a state. A
    token's map is h' = a h + x, or with ADJOINT h' = a (h + x)."""
    n, d, at, at_chunk = _program(T, D, C, BD)
    A = tl.full((BD,), 1.0, tl.float32)
    h = tl.full((BD,), 0.0, tl.float32)
    for step in range(C):
        t = n * C + step
        if REVERSE:
            t = n * C + C - 1 - step
        inside = (d < D) & (t < T)
        a = tl.load(decay + at + t.to(tl.int64) * D, mask=inside, other=1.0).to(tl.float32)
        x_t = tl.load(x + at + t.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)
        A *= a
        if ADJOINT:
            h = a * (h + x_t)
        else:
            h = a * h + x_t
    tl.store(product + at_chunk, A, mask=d < D)
    tl.store(local + at_chunk, h, mask=d < D)


@triton.jit
def carry(
    product, local, initial, entering, final,
    T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes the states that enter T chunks, and the final one, from their maps.
    One program goes through all chunks of BD channels."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1).to(tl.int64)
    h = tl.load(initial + b * D + d, mask=d < D, other=0.0)
    for step in range(T):
        n = step
        if REVERSE:
            n = T - 1 - step
        at = (b * T + n) * D + d
        tl.store(entering + at, h, mask=d < D)
        A = tl.load(product + at, mask=d < D, other=1.0)
        # A state that is 0 stays 0, though a product of decays may be infinite.
        h = tl.where(h == 0.0, 0.0, A * h) + tl.load(local + at, mask=d < D, other=0.0)
    tl.store(final + b * D + d, h, mask=d < D)


@triton.jit
def scan(
    x, decay, entering, out,
    T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes h_t = a_t h_{t-1} + x_t of one chunk from its entering state."""
    n, d, at, at_chunk = _program(T, D, C, BD)
    h = tl.load(entering + at_chunk, mask=d < D, other=0.0)
    for step in range(C):
        t = n * C + step
        if REVERSE:
            t = n * C + C - 1 - step
        inside = (d < D) & (t < T)
        a = tl.load(decay + at + t.to(tl.int64) * D, mask=inside, other=1.0).to(tl.float32)
        x_t = tl.load(x + at + t.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)
        h = a * h + x_t
        tl.store(out + at + t.to(tl.int64) * D, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradients(
    g, decay, h, initial, entering, dx, ddecay,
    T: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Triton kernel: computes dx_t = l_t and da_t = l_t h_{t-1} of one chunk.

    Here l_t = g_t + c_t and c_{t-1} = a_t l_t; g is the gradient of h, and c begins as `entering`.
    initial: the state before the first token. REVERSE is that of the forward scan.
    """
    n, d, at, at_chunk = _program(T, D, C, BD)
    b = tl.program_id(1).to(tl.int64)
    c = tl.load(entering + at_chunk, mask=d < D, other=0.0)
    first = tl.load(initial + b * D + d, mask=d < D, other=0.0)
    for step in range(C):
        if REVERSE:
            t = n * C + step
            earlier = t + 1
        else:
            t = n * C + C - 1 - step
            earlier = t - 1
        inside = (d < D) & (t < T)
        has_earlier = inside & (earlier >= 0) & (earlier < T)
        a = tl.load(decay + at + t.to(tl.int64) * D, mask=inside, other=1.0).to(tl.float32)
        g_t = tl.load(g + at + t.to(tl.int64) * D, mask=inside, other=0.0).to(tl.float32)
        h_t = tl.load(h + at + earlier.to(tl.int64) * D, mask=has_earlier, other=0.0)
        h_t = tl.where(has_earlier, h_t, first)
        l = g_t + c
        c = a * l
        tl.store(dx + at + t.to(tl.int64) * D, l.to(dx.dtype.element_ty), mask=inside)
        tl.store(ddecay + at + t.to(tl.int64) * D, l * h_t, mask=inside)
