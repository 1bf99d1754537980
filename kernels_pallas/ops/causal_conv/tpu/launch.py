"""The short causal convolution, its activation and norm as Mosaic TPU kernels: one pass over HBM,
forward and backward.

The grid is (rows of the batch, chunks of time, channels). Forward, x is read and y written.
Backward, x and the gradient of y are read, everything is computed again, and dx is written. Time
runs backwards, so that the gradients of the next tokens' sums, dz, are in VMEM when
dx_t = sum_j w_{I-1-j} dz_{t+j} needs them. The gradients of w and bias are sums in VMEM. The inputs
before a chunk are a block of x of their own, of 16 tokens.

Tokens lie along sublanes, where a shift by one costs several operations in registers; but from
memory that is 128 channels wide, 8 tokens are loaded in one from any row. So the tokens of a chunk
are first copied to such columns, in float32. Two tokens of bfloat16 share a sublane's word, and are
taken apart by a shift and a mask: even tokens become one column, odd ones another ("parts"), which
also halves the different loads of a tap. Results go back the same way.

silu(z) is h u with h = z/2 and u = 2 / (1 + exp(-2h)); `run` halves w and bias for it. Its
derivative by h is u (1 + h (2 - u)). (1 + tanh h is the same u, but has no digits where h is far
below 0, and the norm of such a head shows it.) The norm is y = a r with r = (sum a^2 + eps)^(-1/2)
per head, and its derivative da = r (g - a r^2 sum g a). Sums over heads of other widths than whole
128s are products with zeros and ones.

Documents: `age` counts the inputs before a token that its taps may reach, and `room` the tokens
after it whose taps reach it, both cut at I-1 and repeated over 128 lanes. A tap of lag j counts
where age >= j.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.common import kernel_vjp
from kernels_pallas.dispatch import tuning
from kernels_pallas.ops.causal_conv import reference, shifted
from kernels_pallas.ops.causal_conv.tpu import kernels
from kernels_pallas.ops.causal_conv.tpu.kernels import LANES, ROWS
from kernels_pallas.tpu import tiling as tpu_tiling
from kernels_pallas.tpu.tiling import VMEM_BYTES

HALO = 16  # tokens: the shortest block of bfloat16
WIDEST = 1024  # channels that heads may take to fill whole registers
# Tokens and channels of a block where `tuned.json` says nothing else.
SIZES = {"chunk_size": 512, "width": 512}


def unsupported_reason(x_BTD, w, bias, initial_state, start_BT, finish) -> str | None:
    """Returns None if the TPU kernels can run this call, else the reason. start_BT: where documents
    start. finish: options of the activation and the norm."""
    for name, array in (("x", x_BTD), ("w", w)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}; it takes float32 and bfloat16 ('shifted' takes all)"
    if w.shape[0] > HALO + 1:
        return f"the width is {w.shape[0]}; it takes up to {HALO + 1} ('shifted' takes any)"
    tiling = Tiling.of(x_BTD, w, bias, start_BT, finish)
    if tiling.group * LANES > WIDEST:
        return (
            f"heads of {tiling.K} channels fill registers of {LANES} only in groups of "
            f"{tiling.group * LANES} channels; it takes groups of up to {WIDEST}, such as divisors "
            f"and multiples of {LANES} need"
        )
    if tiling.vmem_bytes > VMEM_BYTES:
        return (
            f"{tiling.D} channels take {tiling.vmem_bytes >> 20} MiB of VMEM, of "
            f"{VMEM_BYTES >> 20}; give it fewer at a time"
        )
    return None


def run(x_BTD, w, bias, initial_state, start_BT, finish):
    """Computes the convolution by the TPU kernels; returns y and the tail (the last inputs).
    start_BT: where documents start. finish: options of the activation and the norm."""
    tiling = Tiling.of(x_BTD, w, bias, start_BT, finish)
    if bias is not None:
        w = jnp.concatenate([w.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    w = w.astype(jnp.float32) * (0.5 if tiling.silu else 1.0)
    w = jnp.pad(w, ((0, 0), (0, tiling.all_channels - tiling.D)))
    return _conv((tiling, finish), start_BT, x_BTD, w, initial_state)


def _forward(static, start_BT, x_BTD, w, initial_state):
    """Returns ((y, the tail of the inputs), no residuals). static: the tiling and the
    `reference.Finish`. w: float32, with the bias below the taps, both halved for silu."""
    tiling, _ = static
    (y_BTD,) = _launch(
        tiling,
        kernels.forward,
        [*_inputs(x_BTD, w, initial_state), *_marks(tiling, start_BT, x_BTD.dtype)[:1]],
        [(x_BTD, "time")],
        [tiling.halo + tiling.rows, *([tiling.rows] if tiling.K else [])],
    )
    tail = reference.tail(x_BTD, initial_state, start_BT)
    return (y_BTD, tail), ()


def _backward(static, start_BT, arrays, _, cotangents):
    (tiling, _), (x_BTD, w, initial_state), (g_BTD, g_tail) = static, arrays, cotangents
    first = (tiling.B, tiling.p, tiling.halo, tiling.all_channels)
    dx_BTD, dw, dz = _launch(
        tiling,
        kernels.backward,
        [
            *_inputs(x_BTD, w, initial_state),
            *_marks(tiling, start_BT, x_BTD.dtype),
            (g_BTD, "time"),
        ],
        [
            (x_BTD, "time"),
            (jax.ShapeDtypeStruct(w.shape, jnp.float32), "sum"),
            (jax.ShapeDtypeStruct(first, jnp.float32), "first"),
        ],
        [
            tiling.halo + tiling.rows,
            tiling.rows + tiling.halo,
            *([tiling.rows] * 2 if tiling.K else []),
        ],
    )
    # The initial state's gradient, from dz of the first tokens.
    dz_BSD = jnp.moveaxis(dz, 1, 2).reshape(tiling.B, HALO, -1)[..., : tiling.D]
    # The tail's gradient: the tail holds inputs from the last I-1 tokens only.
    last = max(tiling.T - (tiling.width - 1), 0)
    start_last = None if start_BT is None else start_BT[:, last:]
    _, tail_vjp = jax.vjp(
        lambda x, z: reference.tail(x, z, start_last), x_BTD[:, last:], initial_state
    )
    dx_tail, d_initial = tail_vjp(g_tail)
    dx_BTD = dx_BTD.at[:, last:].add(dx_tail)
    d_initial = d_initial + _initial_gradient(tiling, dz_BSD, w, start_BT).astype(d_initial.dtype)
    return dx_BTD, dw, d_initial


def _plain(static, start_BT, x_BTD, w, initial_state):
    tiling, finish = static
    w = w[:, : tiling.D] * (2.0 if tiling.silu else 1.0)
    bias = w[tiling.width] if tiling.bias else None
    return shifted.run(x_BTD, w[: tiling.width], bias, initial_state, start_BT, finish)


_conv = kernel_vjp.differentiable(_forward, _backward, _plain, save=False)  # cheap to do again


def _inputs(x_BTD, w, initial_state):
    """Returns (array, kind of its block) pairs of the inputs that both kernels read first."""
    missing = HALO - initial_state.shape[1]
    initial_BSD = jnp.pad(initial_state, ((0, 0), (missing, 0), (0, 0)))
    return (x_BTD, "time"), (x_BTD, "before"), (initial_BSD, "initial"), (w, "w")


def _marks(tiling, start_BT, dtype):
    """Returns `age` and `room` of the module's docstring, (B, T, LANES), as (array, "mark") pairs.
    Without documents it returns []."""
    if start_BT is None:
        return []
    T = start_BT.shape[1]

    def counted(starts_at):
        """Counts a token's neighbours in its document, nearest first, at most width - 1. starts_at:
        takes j to whether a document starts between a token and the one j away."""
        count_BT, going_BT = jnp.zeros(start_BT.shape, dtype), True
        for j in range(1, tiling.width):
            going_BT = going_BT & ~starts_at(j)
            count_BT = count_BT + going_BT.astype(dtype)
        return jnp.broadcast_to(count_BT[..., None], (*start_BT.shape, LANES)), "mark"

    return [
        counted(lambda j: jnp.pad(start_BT, ((0, 0), (j - 1, 0)))[:, :T]),
        counted(lambda j: jnp.pad(start_BT, ((0, 0), (0, j)))[:, j:]),
    ]


def _initial_gradient(tiling, dz_BSD, w, start_BT):
    """Computes the initial state's gradient (B, I-1, D). dz_BSD: gradient of the filter's output at
    the first HALO tokens."""
    n = tiling.width - 1
    if start_BT is not None:
        start_BS = jnp.pad(start_BT, ((0, 0), (0, HALO)))[:, :HALO]
        (age_BSL, _), _ = _marks(tiling, start_BS, jnp.float32)
    gradient = jnp.zeros((tiling.B, n, tiling.D))
    for j in range(1, tiling.width):
        # The tap of lag j reads the initial state at the first j tokens.
        own = dz_BSD if start_BT is None else jnp.where(age_BSL[..., :1] >= j, dz_BSD, 0)
        reached = own[:, :j] * w[n - j, : tiling.D][None, None]
        gradient = gradient + jnp.pad(reached, ((0, 0), (n - j, 0), (0, 0)))
    return gradient


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one convolution on a TPU and of its blocks.

    width: taps. packed: whether documents are marked. K: channels per head of the norm, or None.
    p: tokens per 32-bit word. C, d: tokens and channels of a block.
    group: columns of LANES channels that together hold whole heads, and are computed together.
    """

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
        """Returns the rows of 32-bit words in a block."""
        return self.C // self.p

    @property
    def halo(self):
        return HALO // self.p

    @property
    def vmem_bytes(self):
        """Estimates the backward kernel's VMEM. It adds double-buffered blocks, scratch, what stays
        for the whole grid, and spilled registers."""
        item = 4 // self.p
        blocks = item * (3 * self.C * self.d + 2 * HALO * self.d + 2 * self.C * LANES)
        blocks += 4 * self.all_channels * (HALO + pl.cdiv(self.width + 1, ROWS) * ROWS)
        columns = 4 * LANES * self.group * (self.C + HALO) * (4 if self.K else 2)
        return 2 * blocks + columns + 4 * HALO * self.all_channels + (1 << 20)

    def spec(self, kind: str, array, backward: bool):
        """Returns the block spec of an array. kind: what its block holds, "time" for its own
        tokens, "before" for those before. backward: whether the grid begins at the last chunk."""

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


def _launch(tiling: Tiling, kernel, inputs, outputs, columns):
    """Launches the forward or backward kernel and returns a list of its outputs.

    inputs, outputs: (array or shape, kind of its block in `Tiling.spec`) pairs.
    columns: rows of each scratch array.
    """
    backward = kernel is kernels.backward
    scratch = [(tiling.p, tiling.group, rows, LANES) for rows in columns]
    if backward:  # dz of the chunk that follows in time
        scratch.append((tiling.all_channels // LANES, tiling.p, tiling.halo, LANES))
    read, written = (
        [(tiling.spec(kind, array, backward), array) for array, kind in side]
        for side in (inputs, outputs)
    )
    return tpu_tiling.launch(
        functools.partial(kernel, tiling),
        f"causal_conv_{kernel.__name__}",
        (tiling.B, tiling.chunks, tiling.blocks),
        read,
        written,
        scratch,
        semantics=("arbitrary" if backward else "parallel",) * 3,
    )
