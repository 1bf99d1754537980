"""Sums over packed documents as Mosaic TPU kernels: two walks over the chunks.

The first walk, from the last chunk to the first, carries the sum of the run that crosses a chunk's
left edge and writes what enters each chunk from the right. The second, from the first chunk on,
carries what enters from the left, and computes the output. Nothing is reversed or shifted in
memory. The names are those of docs/math/document_sums.md; as the operator is its own derivative,
the same two kernels compute all gradients, of any order (`chunked._sums`).

A grid step is one chunk of some key heads, whose W value columns are those of all their value
heads. What a chunk needs to know of documents and blocks comes as rows of C numbers (`_rows`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.common import dtypes
from kernels_pallas.dispatch import manual_axes
from kernels_pallas.ops.document_sums import chunked, reference
from kernels_pallas.tpu import tiling as tpu_tiling
from kernels_pallas.tpu.primitives import Products, lower
from kernels_pallas.tpu.vjp import pad_end

HEADS = 4  # of a grid step: the chain of products of one fills the gaps of another's
ROWS = 16  # of `_rows`, some of them unused: whole registers of sublanes
LEFT, RIGHT, BEFORE, BEHIND, TO_RIGHT, TO_LEFT, PASSES_P, PASSES_Q, ENTRY_P, ENTRY_Q = range(10)


class Tiling(NamedTuple):
    """Sizes of one call: K and W padded to whole lanes, C tokens per chunk, heads per grid step."""

    B: int
    N: int
    G: int
    K: int
    W: int
    C: int
    heads: int
    products: Products

    @property
    def vmem_bytes(self) -> int:
        """Estimates the VMEM that the larger kernel takes, rather too high than too low."""
        size, state = self.products.dtype.itemsize, self.heads * self.K * self.W
        blocks = self.C * self.heads * (2 * size * self.K + (size + 4) * self.W)
        blocks += (size + 8) * state + 4 * ROWS * self.C
        held = 8 * state + 4 * 8 * self.C * max(self.C, self.K, self.W)
        return 2 * blocks + held


def tiling_of(q_BTGK, k_BTGK, v_BTGW, C: int | None) -> Tiling:
    """Returns the tiling with the longest chunks, then the most heads, that fits VMEM; if none
    does, the smallest. C: tokens per chunk, None to choose them."""
    B, T, G, K = q_BTGK.shape
    W = v_BTGW.shape[-1]
    narrow = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTGW))
    most = HEADS if narrow else HEADS // 2
    cuts = []
    for unit in (64, 128):  # padded to whole registers where heads cannot be paired
        K, W = (-(-x // unit) * unit for x in (K, W))
        cuts = cuts or tpu_tiling.head_cuts(G, G, K, W, most, per_channel=False, own_keys=False)
    longest = 256 if narrow else 128
    lengths = [C] if C else [n for n in (longest, 128, 64, 32, 16) if n <= longest]
    products = Products(narrow)
    tilings = [
        Tiling(B, -(-T // n), G, K, W, n, heads, products) for n in lengths for heads, _ in cuts
    ]
    fitting = (t for t in tilings if t.vmem_bytes <= tpu_tiling.VMEM_BYTES)
    return next(fitting, tilings[-1])


def unsupported_reason(*, q_BTGK, k_BTGK, v_BTHV, initial_state_BHKV, chunk_size, **others):
    """Returns None if the kernels can run this call, else the reason and a way out."""
    del others
    named = {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV, "initial_state": initial_state_BHKV}
    for name, x in named.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; it takes float32 and bfloat16 ('chunked' takes any)"
    B, T, G, K = q_BTGK.shape
    v_BTGW = jax.ShapeDtypeStruct((B, T, G, v_BTHV.size // (B * T * G)), v_BTHV.dtype)
    # The gradients exchange K and W.
    tiling = tiling_of(q_BTGK, k_BTGK, v_BTGW, chunk_size)
    size = tiling._replace(K=max(tiling.K, tiling.W), W=max(tiling.K, tiling.W)).vmem_bytes
    if size <= tpu_tiling.VMEM_BYTES:
        return None
    return (
        f"K = {K}, {v_BTGW.shape[3]} value columns per key head and chunks of {tiling.C} take "
        f"{size >> 20} MiB of VMEM, of {tpu_tiling.VMEM_BYTES >> 20}: use 'chunked'"
    )


def run(*, q_BTGK, k_BTGK, v_BTHV, segment_ids_BT, block_ids_BT, block_size, chunk_size, **call):
    """Computes sums over documents by the TPU kernels, for arguments normalised by `api.py`."""
    B, T, G, K = q_BTGK.shape
    # One chunk length for the call and its gradients, which exchange K and W.
    X = max(K, v_BTHV.size // (B * T * G))
    wide = dtypes.common(q_BTGK, k_BTGK, v_BTHV)
    like = jax.ShapeDtypeStruct((B, T, G, X), wide)
    C = tiling_of(like, like, like, chunk_size).C
    if block_ids_BT is None:
        segment_ids_BT, block_ids_BT = reference.runs(v_BTHV, None, None, block_size)
    return chunked.run(
        q_BTGK=q_BTGK,
        k_BTGK=k_BTGK,
        v_BTHV=v_BTHV,
        segment_ids_BT=segment_ids_BT,
        block_ids_BT=block_ids_BT,
        block_size=None,
        chunk_size=C,
        kernel=computed,
        **call,
    )


def _rows(form, tiling, runs):
    """Returns what the chunks need to know of runs: numbers (B, N, ROWS, C), in float32.

    By row: the runs of each token to the left and right; those that cross the chunk's edges, from
    before and from behind; 1 for tokens of the runs that reach its right and left edge; and, the
    same for all C tokens, 1 where P and Q pass through the chunk, and where they hold the entry.
    """
    document_BT, block_BT = runs
    left_BT, right_BT = (block_BT, document_BT) if form.reverse else runs
    before_BT = jnp.pad(left_BT[:, :-1], ((0, 0), (1, 0)), mode="edge")
    behind_BT = jnp.pad(right_BT[:, 1:], ((0, 0), (0, 1)), mode="edge")

    def chunks(x_BT):
        return x_BT.reshape(tiling.B, tiling.N, tiling.C)

    left, right = chunks(left_BT), chunks(right_BT)
    before, behind = chunks(before_BT)[..., :1], chunks(behind_BT)[..., -1:]
    last_B11 = document_BT[:, -1:, None]
    rows = {
        LEFT: left,
        RIGHT: right,
        BEFORE: before,
        BEHIND: behind,
        TO_RIGHT: left == left[..., -1:],
        TO_LEFT: right == right[..., :1],
        PASSES_P: before == left[..., -1:],
        PASSES_Q: behind == right[..., :1],
        ENTRY_P: (before == 0) & (not form.reverse),
        ENTRY_Q: (behind == last_B11) & form.reverse,
    }
    shape = left.shape
    listed = [jnp.broadcast_to(rows[n], shape).astype(jnp.float32) for n in range(len(rows))]
    return pad_end(jnp.stack(listed, axis=2), {2: ROWS - len(rows)})


def computed(form, q_BTGK, k_BTGK, v_BTGW, entry_BGKW, runs):
    """Computes `chunked._sums` by two kernels; returns (o_BTGW, the sum over one document)."""
    tiling = tiling_of(q_BTGK, k_BTGK, v_BTGW, form.C)
    (B, T, G, K), W = q_BTGK.shape, v_BTGW.shape[-1]

    def flat(x_BTGX, width):
        x_BTGX = pad_end(x_BTGX.astype(tiling.products.dtype), {3: width - x_BTGX.shape[3]})
        return x_BTGX.reshape(B, T, G * width)

    q, k, v = flat(q_BTGK, tiling.K), flat(k_BTGK, tiling.K), flat(v_BTGW, tiling.W)
    entry = entry_BGKW.astype(jnp.float32)
    entry = pad_end(entry, {2: tiling.K - K, 3: tiling.W - W})
    rows = _rows(form, tiling, runs)
    rows, q, k, v, entry = manual_axes.alike((rows, q, k, v, entry))
    states = jax.ShapeDtypeStruct((B, tiling.N, *entry.shape[1:]), tiling.products.dtype)
    Q, first = _launch(
        tiling, f"{form.name}_from_right", _from_right, True,
        [("rows", rows), ("key", k), ("value", v)], [("states", states), ("state", entry)],
    )  # fmt: skip
    o = jax.ShapeDtypeStruct(v.shape, form.dtype)
    o, last = _launch(
        tiling, f"{form.name}_read", functools.partial(_read_kernel, form.scale), False,
        [("rows", rows), ("key", q), ("key", k), ("value", v), ("states", Q), ("state", entry)],
        [("value", o), ("state", entry)],
    )  # fmt: skip
    summed = (first if form.reverse else last)[:, :, :K, :W]
    return o.reshape(B, T, G, tiling.W)[..., :W], summed.astype(entry_BGKW.dtype)


def _launch(tiling, name, kernel, reverse, inputs, outputs):
    """Launches a kernel over (rows of the batch, groups of heads, chunks); returns its outputs."""
    C, N, heads = tiling.C, tiling.N, tiling.heads

    def at(n):
        return N - 1 - n if reverse else n

    state = heads, tiling.K, tiling.W
    specs = {
        "rows": pl.BlockSpec((1, 1, ROWS, C), lambda b, x, n: (b, at(n), 0, 0)),
        "key": pl.BlockSpec((1, C, heads * tiling.K), lambda b, x, n: (b, at(n), x)),
        "value": pl.BlockSpec((1, C, heads * tiling.W), lambda b, x, n: (b, at(n), x)),
        "states": pl.BlockSpec((1, 1, *state), lambda b, x, n: (b, at(n), x, 0, 0)),
        "state": pl.BlockSpec((1, *state), lambda b, x, n: (b, x, 0, 0)),
    }
    return tpu_tiling.launch(
        functools.partial(kernel, tiling),
        name,
        (tiling.B, tiling.G // heads, N),
        [(specs[kind], x) for kind, x in inputs],
        [(specs[kind], x) for kind, x in outputs],
        [state],
        semantics=("parallel", "parallel", "arbitrary"),
    )


def _row(rows_ref, n, width):
    """Reads row n of a chunk, (1, C), or of one whose numbers are equal its first `width` ones."""
    row = rows_ref[0, 0, n : n + 1, :]
    copies = -(-width // row.shape[1])
    return (jnp.concatenate([row] * copies, axis=1) if copies > 1 else row)[:, :width]


def _head(ref, h, width):
    return ref[0, :, h * width : (h + 1) * width]


def _add_chunk(tiling, rows_ref, to, passes, k_CK, v_CW, S_KW):
    """Returns S' = [passes] S + sum_j [j reaches the edge] k_j v_j^T."""
    k_KC = k_CK.T.astype(jnp.float32) * _row(rows_ref, to, tiling.C)
    added_KW = tiling.products.rounded(k_KC.astype(k_CK.dtype), v_CW)
    return S_KW * _row(rows_ref, passes, tiling.W) + added_KW


def _from_right(tiling, rows_ref, k_ref, v_ref, states_ref, first_ref, Q_ref):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        Q_ref[...] = jnp.zeros_like(Q_ref)

    for h in range(tiling.heads):
        Q_KW = Q_ref[h]
        states_ref[0, 0, h] = Q_KW.astype(states_ref.dtype)
        k_CK, v_CW = _head(k_ref, h, tiling.K), _head(v_ref, h, tiling.W)
        # Q' = [r_{C+1} = r_1] Q + sum_j [r_j = r_1] k_j v_j^T
        Q_ref[h] = _add_chunk(tiling, rows_ref, TO_LEFT, PASSES_Q, k_CK, v_CW, Q_KW)

    @pl.when(n == tiling.N - 1)
    def _():
        first_ref[0] = Q_ref[...]


def _read_kernel(
    scale, tiling, rows_ref, q_ref, k_ref, v_ref, Q_ref, entry_ref, o_ref, last_ref, P_ref
):
    n, C, p = pl.program_id(2), tiling.C, tiling.products

    @pl.when(n == 0)
    def _():
        P_ref[...] = jnp.zeros_like(P_ref)

    def same(run):
        """Returns the run of each token i along the sublanes, and whether it is that of j."""
        j_CC = jnp.broadcast_to(_row(rows_ref, run, C), (C, C))
        i_CC = j_CC.T
        return i_CC, i_CC == j_CC

    def crossing(run_CC, edge):
        """Returns 1 for tokens of the run that crosses an edge of the chunk, (C, K)."""
        copies = -(-tiling.K // C)
        run_CK = jnp.concatenate([run_CC] * copies, axis=1)[:, : tiling.K]
        return jnp.where(run_CK == _row(rows_ref, edge, tiling.K), 1.0, 0.0)

    # M_ij, with the scale: j <= i in i's run to the left, or j > i in that to the right
    left_CC, same_left_CC = same(LEFT)
    right_CC, same_right_CC = same(RIGHT)
    lower_CC = lower(C)
    M_CC = jnp.where(lower_CC, jnp.where(same_left_CC, scale, 0.0), 0.0)
    M_CC += jnp.where(lower_CC, 0.0, jnp.where(same_right_CC, scale, 0.0))
    from_left_CK, from_right_CK = crossing(left_CC, BEFORE), crossing(right_CC, BEHIND)
    for h in range(tiling.heads):
        q_CK, k_CK = _head(q_ref, h, tiling.K), _head(k_ref, h, tiling.K)
        v_CW, P_KW, entry_KW = _head(v_ref, h, tiling.W), P_ref[h], entry_ref[0, h]
        # A_ij = M_ij q_i^T k_j
        A_CC = p.rounded(q_CK, k_CK, (1, 1)) * M_CC
        # P and Q, with the scale, and the entry in one of them
        S_left_KW = scale * P_KW + _row(rows_ref, ENTRY_P, tiling.W) * entry_KW
        S_right_KW = scale * Q_ref[0, 0, h].astype(jnp.float32)
        S_right_KW += _row(rows_ref, ENTRY_Q, tiling.W) * entry_KW
        # o = A v + [l_i = l_0] P^T q + [r_i = r_{C+1}] Q^T q
        q_wide_CK = q_CK.astype(jnp.float32)
        q_left_CK, q_right_CK = (
            (q_wide_CK * mask).astype(q_CK.dtype) for mask in (from_left_CK, from_right_CK)
        )
        o_CW = p.rounded(A_CC, v_CW) + p.rounded(q_left_CK, S_left_KW)
        o_CW += p.rounded(q_right_CK, S_right_KW)
        o_ref[0, :, h * tiling.W : (h + 1) * tiling.W] = o_CW.astype(o_ref.dtype)
        # P' = [l_0 = l_C] P + sum_j [l_j = l_C] k_j v_j^T
        P_ref[h] = _add_chunk(tiling, rows_ref, TO_RIGHT, PASSES_P, k_CK, v_CW, P_KW)

    @pl.when(n == tiling.N - 1)
    def _():
        last_ref[0] = P_ref[...]
