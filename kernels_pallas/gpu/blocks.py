"""Building blocks of the Triton kernels: masked tiles, products with a stated rounding, and sums of
log decay.

Imported only by modules of kernels, and these only when a kernel runs. A tile's rows are tokens
from `first` on; rows beyond T and columns beyond the width load as 0, so a padded token neither
writes nor decays the state. A decay per token is a tile of one column; a reset is finite. Sums of
log decay have non-positive terms only and are never differences (docs/math/linear_attention.md).
"""

import triton
import triton.language as tl


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    """Multiplies matrices x and y with float32 sums and the rounding that PRECISION names.

    "ieee" and "tf32x3" are Triton's. "bf16" rounds both operands to bfloat16. "bf16x2" takes a
    bfloat16 operand as it is and any other as a sum of two bfloat16 terms, without the product of
    the two smaller ones: 2^-16, at the fastest rate of tensor cores; "bf16x3" as a sum of three,
    2^-24. "fp64" multiplies and returns float64. "... rounded" gives in the interpreter, which has
    no bfloat16 products, what "..." gives on a tensor core.
    """
    if PRECISION == "fp64":
        out = tl.dot(x.to(tl.float64), y.to(tl.float64), out_dtype=tl.float64)
    elif PRECISION == "bf16" or PRECISION == "bf16 rounded":
        ROUNDED: tl.constexpr = PRECISION == "bf16 rounded"
        out = _bf16_dot(_to_bf16(x, ROUNDED), _to_bf16(y, ROUNDED), ROUNDED)
    elif PRECISION == "bf16x2" or PRECISION == "bf16x2 rounded":
        out = _terms_dot(x, y, 2, PRECISION == "bf16x2 rounded")
    elif PRECISION == "bf16x3" or PRECISION == "bf16x3 rounded":
        out = _terms_dot(x, y, 3, PRECISION == "bf16x3 rounded")
    else:
        out = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    return out


@triton.jit
def _terms_dot(x, y, TERMS: tl.constexpr, ROUNDED: tl.constexpr):
    """Multiplies x and y as sums of TERMS (2 or 3) bfloat16 terms, smallest products first. A
    bfloat16 operand is its own only term. ROUNDED: for Triton's interpreter, as in `dot`."""
    x0, y0 = _to_bf16(x, ROUNDED), _to_bf16(y, ROUNDED)
    x1, y1 = _rest(x, x0, ROUNDED), _rest(y, y0, ROUNDED)
    out = tl.full((x.shape[0], y.shape[1]), 0.0, tl.float32)
    if TERMS == 3:
        if x.dtype != tl.bfloat16:
            x2 = _rest(x - x0.to(tl.float32), x1, ROUNDED)
            out += _bf16_dot(x2, y0, ROUNDED)
        if y.dtype != tl.bfloat16:
            y2 = _rest(y - y0.to(tl.float32), y1, ROUNDED)
            out += _bf16_dot(x0, y2, ROUNDED)
        if x.dtype != tl.bfloat16 and y.dtype != tl.bfloat16:
            out += _bf16_dot(x1, y1, ROUNDED)
    if x.dtype != tl.bfloat16:
        out += _bf16_dot(x1, y0, ROUNDED)
    if y.dtype != tl.bfloat16:
        out += _bf16_dot(x0, y1, ROUNDED)
    return out + _bf16_dot(x0, y0, ROUNDED)


@triton.jit
def _rest(x, high, ROUNDED: tl.constexpr):
    return _to_bf16(x.to(tl.float32) - high.to(tl.float32), ROUNDED)


@triton.jit
def _to_bf16(x, ROUNDED: tl.constexpr):
    """Rounds x to the nearest bfloat16. ROUNDED: rounds the bits first, for Triton's interpreter,
    which otherwise truncates."""
    if ROUNDED and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _bf16_dot(x, y, ROUNDED: tl.constexpr):
    if ROUNDED:
        out = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(x, y)
    return out


@triton.jit
def head(T, XH, H, GH):
    """Returns this program's index b * H + h, and the offsets at which its head's tokens begin.
    They count heads in arrays (B, T, heads, dim): XH for keys, H for values, GH (1 or H) for
    decay."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    return bh, b * T * XH + h // (H // XH), b * T * H + h, b * T * GH + h * (GH // H)


@triton.jit
def load_tile(x, stride, first, T, left, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads a tile (ROWS, COLUMNS) of the matrix x, with zeros outside (T, width). Rows begin at
    `first` and lie `stride` apart; columns begin at `left`."""
    i = first + tl.arange(0, ROWS)[:, None]
    c = left + tl.arange(0, COLUMNS)[None, :]
    return tl.load(x + i.to(tl.int64) * stride + c, mask=(i < T) & (c < width), other=0.0)


@triton.jit
def store_tile(x, stride, first, T, left, width, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores a tile (ROWS, COLUMNS) to the matrix x, in x's dtype, and nothing outside (T, width).
    Rows begin at `first` and lie `stride` apart; columns begin at `left`."""
    i = first + tl.arange(0, ROWS)[:, None]
    c = left + tl.arange(0, COLUMNS)[None, :]
    at = x + i.to(tl.int64) * stride + c
    tl.store(at, tile.to(x.dtype.element_ty), mask=(i < T) & (c < width))


@triton.jit
def load_g_cumsum(g, stride, first, T, left, width, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes (C, COLUMNS) sums of log decay from the first of C tokens through each token."""
    return tl.cumsum(load_tile(g, stride, first, T, left, width, C, COLUMNS), axis=0)


@triton.jit
def load_g_reversed(g, stride, first, T, left, width, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes (C, COLUMNS) sums of log decay after each of C tokens, through the last."""
    last = tl.minimum(T, first + C)
    return tl.cumsum(
        load_tile(g, stride, first + 1, last, left, width, C, COLUMNS), axis=0, reverse=True
    )


@triton.jit
def load_g_total(g, stride, first, T, left, width, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes the sum of log decay over C tokens, as a column (COLUMNS, 1)."""
    return tl.sum(load_tile(g, stride, first, T, left, width, C, COLUMNS), axis=0)[:, None]


@triton.jit
def pair_decay(g, stride, first, T, C: tl.constexpr, STRICT: tl.constexpr):
    """Computes D_ij = exp(g_{j+1} + ... + g_i) of a chunk for j <= i (STRICT: j < i), else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    terms = tl.where(i > j, load_tile(g, stride, first, T, 0, 1, C, 1), 0.0)
    D = tl.exp(tl.cumsum(terms, axis=0))
    if STRICT:
        D = tl.where(i > j, D, 0.0)
    else:
        D = tl.where(i >= j, D, 0.0)
    return D
