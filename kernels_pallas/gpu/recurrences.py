"""Code shared by the Triton forms of linear attention and the delta rule: sizes, precision, and one
function per kernel.

Arrays keep the operator's layout, (B, T, heads, dim). States at chunk boundaries are
(B, H, N, K, V) and scores (B, H, N, C, C), both float32. Gradients of shared q and k are computed
per value head and summed over their group outside the kernels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import decay
from kernels_pallas.gpu import launch

LARGEST = 256  # K and V; beyond, a tile of scores' operands leaves the registers
SUB = 16  # tokens of a sub-chunk, where decay is per channel


class TritonForm(NamedTuple):
    """Sizes and precision of one Triton call of a matrix recurrence, fixed at tracing.

    dtype: "bfloat16" or "float32", the key of tuned sizes. C: tokens per chunk.
    XH: heads of q and k. GH, GK: heads (1 or H) and channels (1 or K) of the decay.
    inputs, mixed, sums: precision of products of two inputs, of values computed from inputs, and of
      sums by products. bfloat16 inputs multiply as they are, and values computed from them as two
      bfloat16 terms: one costs up to 3e-2 of a gradient's rms at its worst position, and with TF32
      a delta rule with beta = 2 drifts. float32 is IEEE.
    """

    operator: str
    dtype: str
    T: int
    XH: int
    H: int
    K: int
    V: int
    GH: int
    GK: int
    C: int
    inputs: str
    mixed: str
    sums: str

    @property
    def constants(self):
        """Returns the kernels' compile-time constants by name: sizes, precisions and SUB."""
        precisions = {"INPUTS": self.inputs, "MIXED": self.mixed, "SUMS": self.sums}
        precisions = {name: launch.precision(given) for name, given in precisions.items()}
        return self._asdict() | precisions | {"SUB": SUB}

    @property
    def N(self):
        """Returns the number of chunks."""
        return -(-self.T // self.C)

    @property
    def per_channel(self) -> bool:
        return self.GK > 1

    @classmethod
    def of(cls, operator, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, chunk_size, default_chunk):
        """Returns the sizes and precision of a call, read off its arrays' shapes and dtypes.
        chunk_size: tokens per chunk, None for `default_chunk`; it is cut to about T."""
        T, XH, K = q_BTGK.shape[1:]
        H, V = v_BTHV.shape[2:]
        dtypes = {x.dtype for x in (q_BTGK, k_BTGK, v_BTHV)}
        narrow = dtypes == {jnp.dtype(jnp.bfloat16)}
        wide = jnp.dtype(jnp.float32) in dtypes
        GH, GK = (1, 1) if log_decay_BTHK is None else log_decay_BTHK.shape[2:]
        return cls(
            operator,
            "float32" if wide else "bfloat16",
            *(T, XH, H, K, V, GH, GK),
            C=min(chunk_size or default_chunk, launch.power_of_two(T)),
            inputs="ieee" if wide else "bf16" if narrow else "bf16x2",
            mixed="ieee" if wide else "bf16x2",
            sums="ieee" if wide else "tf32x3",
        )

    def tiles(self, kernel: str, whole_K=False):
        """Returns block sizes, warps and stages of the kernel named `kernel`. whole_K: whether one
        block holds all of K."""
        tiles = launch.tiles(self.operator, kernel, self.dtype, self.K, self.V)
        if whole_K:
            tiles["BK"] = launch.power_of_two(self.K)
        return tiles | {"BG": tiles["BK"] if self.GK > 1 else 1}


def fitting_chunk(longest: int, words: int) -> int:
    """Returns the longest chunk that fits shared memory: `longest` tokens, halved down to 16.
    words: 32-bit words that a program holds there per token of a chunk."""
    C = longest
    while C > 16 and 4 * words * C > launch.shared_limit():
        C //= 2
    return C


def too_long(K: int, C: int, words: int) -> str | None:
    """Returns None if chunks of C tokens fit shared memory, else the reason and what fits. words:
    32-bit words that a program holds there per token of a chunk."""
    takes, limit = 4 * words * C, launch.shared_limit()
    if takes <= limit:
        return None
    return (
        f"K = {K} and chunks of {C} take {takes >> 10} KiB of shared memory, of {limit >> 10}: "
        f"give chunk_size={fitting_chunk(C, words)}"
    )


def unsupported_reason(q_BTGK, v_BTHV, initial_state_BHKV, chunk_size) -> str | None:
    """Returns None if the Triton kernels can run this call, else the reason."""
    K, V = q_BTGK.shape[-1], v_BTHV.shape[-1]
    if max(K, V) > LARGEST:
        return f"K and V go to {LARGEST}; got {K} and {V} (split V over heads, or take 'chunked')"
    B, _, H, _ = v_BTHV.shape
    if B * H > launch.LARGEST_GRID:
        return (
            f"B x H goes to {launch.LARGEST_GRID}; got {B} x {H} "
            "(split the batch, or take 'chunked')"
        )
    if initial_state_BHKV.dtype != jnp.float32:
        return f"states are float32; got {initial_state_BHKV.dtype} ('chunked' takes float64)"
    if chunk_size is not None and chunk_size > 128:
        return f"chunk_size goes to 128; got {chunk_size}"
    return launch.unsupported_reason()


def with_resets(log_decay_BTHK, segment_ids_BT, v_BTHV):
    """Returns the log decay (B, T, GH, GK) with a reset at the first token of each document.
    Without a decay it is zeros (B, T, 1, 1), as the kernels always read one."""
    if log_decay_BTHK is None:
        log_decay_BTHK = jnp.zeros_like(v_BTHV, jnp.float32, (*v_BTHV.shape[:2], 1, 1))
    return decay.with_resets(log_decay_BTHK, segment_ids_BT, jnp.float32)


def every_head(form, g_BTHK):
    """Broadcasts the log decay of `with_resets` to all H heads, as the chunked form takes it."""
    return jnp.broadcast_to(g_BTHK, (*g_BTHK.shape[:2], form.H, form.GK))


def run_kernel(form, kernel, inputs, outputs, grid, *, whole_K=False, **constants):
    """Runs a Triton kernel over a grid (first axis, B * H), with its tuned block sizes.

    inputs, outputs: arrays, and (shape after B, dtype) pairs. grid: factors of the first axis: "K"
      or "V" (the numbers of their blocks), "N" (chunks), or numbers.
    whole_K: whether a block holds all of K. constants: compile-time arguments besides those of
      `form`.
    """
    B = inputs[0].shape[0]
    outputs = [jax.ShapeDtypeStruct((B, *shape), dtype) for shape, dtype in outputs]
    tiles = form.tiles(kernel.__name__, whole_K)
    blocks = {"K": -(-form.K // tiles["BK"]), "V": -(-form.V // tiles["BV"]), "N": form.N}
    first = math.prod(blocks.get(axis, axis) for axis in grid)
    taken = {name: x for name, x in form.constants.items() if name in kernel.arg_names}
    return launch.run(kernel, inputs, outputs, (first, B * form.H), **taken | tiles | constants)


def kernels():
    """Returns the modules `chunks` and `scores`, imported here so that `prepare` comes first."""
    launch.prepare()
    from kernels_pallas.gpu import chunks, scores

    return chunks, scores


def states(form, x_BTGK, y_BTHV, g_BTHK, start_BHKV, *, reverse=False, scale=1.0):
    """Computes the states that enter the chunks (B, H, N, K, V), and the final state (B, H, K, V).

    S' = exp(g_total) S + scale (x exp(g_reversed))^T y, from `start_BHKV`. reverse: with x = q and
    y = do, the cotangents of the states that leave the chunks, and that of the initial state.
    """
    chunks, _ = kernels()
    shape_HKV = form.H, form.K, form.V
    return run_kernel(
        form,
        chunks.states,
        (x_BTGK, y_BTHV, g_BTHK, start_BHKV),
        [((form.H, form.N, form.K, form.V), jnp.float32), (shape_HKV, jnp.float32)],
        ("K", "V"),
        REVERSE=reverse,
        SCALE=scale,
    )


def scores(form, x_BTGK, y_BTGK, g_BTHK, *, strict=False):
    """Computes A_ij = sum_K x_iK y_jK exp(g_{j+1} + ... + g_i)_K for j <= i (strict: j < i).

    Returns (B, H, N, C, C) if decay is per channel; else None, as the other kernels then compute A.
    """
    if not form.per_channel:
        return None
    _, pairs = kernels()
    (scores_BHNCC,) = run_kernel(
        form,
        pairs.decayed_scores,
        (x_BTGK, y_BTGK, g_BTHK),
        [((form.H, form.N, form.C, form.C), jnp.float32)],
        ("N", form.C // SUB),
        STRICT=strict,
    )
    return scores_BHNCC


def outputs(
    form, q_BTGK, k_BTGK, y_BTHV, g_BTHK, states, scores, *, scale, strict=False, dtype=None
):
    """Computes o = scale ((q exp(g_cumsum)) S + A y) (B, T, H, V) for every chunk. states: S, those
    that enter the chunks. scores: A. strict: A_ii = 0. dtype: of o, by default y's."""
    chunks, _ = kernels()
    (o_BTHV,) = run_kernel(
        form,
        chunks.outputs,
        (q_BTGK, k_BTGK, y_BTHV, g_BTHK, states, states if scores is None else scores),
        [((form.T, form.H, form.V), dtype or y_BTHV.dtype)],
        ("N", "V"),
        STRICT=strict,
        SCALE=scale,
    )
    return o_BTHV


def gradients_of_values(
    form, q_BTGK, k_BTGK, g_BTHK, do_BTHV, dstates, scores, *, scale, dtype=jnp.float32
):
    """Computes dy, the gradient of y (B, T, H, V) through `outputs` and `states`. dstates:
    cotangents of the states that leave the chunks, or None for `outputs` alone."""
    chunks, _ = kernels()
    leaving = dstates is not None
    # An operand that the kernel does not read may be any array.
    optional = (dstates if leaving else g_BTHK), (g_BTHK if scores is None else scores)
    (dy_BTHV,) = run_kernel(
        form,
        chunks.gradients_of_values,
        (q_BTGK, k_BTGK, g_BTHK, do_BTHV, *optional),
        [((form.T, form.H, form.V), dtype)],
        ("N", "V"),
        LEAVING=leaving,
        SCALE=scale,
    )
    return dy_BTHV


def gradients_of_keys(
    form, q_BTGK, k_BTGK, y_BTHV, g_BTHK, do_BTHV, states, dstates, *, scale, strict=False
):
    """Computes dq, dk (B, T, XH, K) and the log decay's gradient dg, all float32.

    They are gradients through `outputs` and, if `dstates` is given, through `states`. states,
    dstates: the states that enter the chunks, and the cotangents of those that leave them.
    """
    chunks, pairs = kernels()
    B = q_BTGK.shape[0]
    leaving = dstates is not None
    blocks = -(-form.K // form.tiles("gradients_of_keys")["BK"])
    dx = ((form.T, form.H, form.K), jnp.float32)
    dg = dx if form.per_channel else ((blocks, form.T, form.H), jnp.float32)
    dq_BTHK, dk_BTHK, dg_BTHK = run_kernel(
        form,
        chunks.gradients_of_keys,
        (q_BTGK, k_BTGK, y_BTHV, g_BTHK, do_BTHV, states, dstates if leaving else states),
        [dx, dx, dg],
        ("N", "K"),
        STRICT=strict,
        LEAVING=leaving,
        SCALE=scale,
    )
    if form.per_channel:
        # Pairs inside a chunk, on top of what passes through the states.
        (dscores_BHNCC,) = run_kernel(
            form,
            pairs.gradients_of_scores,
            (do_BTHV, y_BTHV),
            [((form.H, form.N, form.C, form.C), jnp.float32)],
            ("N",),
            STRICT=strict,
            SCALE=scale,
        )
        dq_BTHK, dk_BTHK, dg_BTHK = run_kernel(
            form,
            pairs.gradients_of_operands,
            (q_BTGK, k_BTGK, g_BTHK, dscores_BHNCC, dq_BTHK, dk_BTHK, dg_BTHK),
            [dx, dx, dx],
            ("N", form.C // SUB, "K"),
            STRICT=strict,
        )
    else:
        dg_BTHK = jnp.sum(dg_BTHK, axis=1)[..., None]

    def over_group(x_BTHK):  # summed over the value heads of a key head
        return jnp.sum(x_BTHK.reshape(B, form.T, form.XH, -1, form.K), axis=3)

    if form.GH == 1:
        dg_BTHK = jnp.sum(dg_BTHK, axis=2, keepdims=True)
    return over_group(dq_BTHK), over_group(dk_BTHK), dg_BTHK
