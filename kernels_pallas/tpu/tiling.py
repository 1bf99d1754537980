"""Cuts calls into blocks for TPU kernels, and launches kernels over them.

`RecurrenceTiling` holds what linear attention and the delta rule share: a grid step is one chunk of
some value heads, and the first cut whose estimate fits VMEM is taken. Each operator's
`tpu/tiling.py` adds its own sizes and what its arrays take.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.decay import kind
from kernels_pallas.dispatch import devices, manual_axes, tuning
from kernels_pallas.tpu.primitives import LANES, Products

VMEM_BYTES = 40 << 20  # what a kernel may take: every TPU has 64 MiB per core, or more
VMEM_LIMIT = VMEM_BYTES + (8 << 20)  # what the compiler allows: the estimates are rough


def launch(
    kernel, name, grid, inputs, outputs, scratch, *, semantics, vmem_limit: int | None = VMEM_LIMIT
):
    """Runs a Pallas TPU kernel, or interprets it where a CPU was asked to; returns its outputs.

    Args:
      kernel: called with references to inputs, outputs and scratch, in this order.
      inputs: (block spec, array) pairs.
      outputs: (block spec, shape and dtype) pairs.
      scratch: shapes of float32 arrays in VMEM that stay between grid steps.
      semantics: per grid axis "parallel" or "arbitrary" (steps run in order).
      vmem_limit: bytes of VMEM that the compiler allows; None is its default.
    """
    in_specs, arrays = zip(*inputs)
    out_specs, shapes = zip(*outputs)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=manual_axes.shapes(shapes, arrays),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=vmem_limit
        ),
        interpret=devices.interpreting(),
        name=name,
    )(*arrays)


def head_cuts(G: int, H: int, K: int, V: int, most: int, *, per_channel: bool, own_keys: bool):
    """Lists the possible (value heads, key heads) per grid step, most heads first.

    Mosaic cuts an array's last dimension into whole registers of 128 lanes, or not at all. Heads
    lie side by side in that dimension: H of V values, G of K keys, and H of K decays where decay is
    per channel.

    most: the largest number of value heads per step.
    own_keys: whether every step writes the gradients of the key heads that it reads to a place of
      its own, even where several steps share a key head.
    """
    shared, cuts = H // G, []
    for heads in range(min(H, most), 0, -1):
        keys = max(1, heads // shared)
        blocks = [(heads * V, H * V), (keys * K, H // heads * keys * K if own_keys else G * K)]
        if per_channel:
            blocks.append((heads * K, H * K))
        whole = H % heads == 0 and (heads % shared == 0 or shared % heads == 0)
        if whole and all(block % LANES == 0 or block == array for block, array in blocks):
            cuts.append((heads, keys))
    return cuts


@dataclasses.dataclass(frozen=True)
class RecurrenceTiling:
    """Sizes and blocks of one TPU call of a matrix recurrence: hashable, chosen before tracing.

    T is the call's own; K and V are rounded up to multiples of 64 or 128. C: tokens per chunk.
    heads, keys: value heads and key heads per grid step.
    decay: "none", "per_token" or "per_channel".
    products: how the kernels multiply. scale: factor of the output.
    """

    OPERATOR: ClassVar[str]
    OWN_KEYS: ClassVar[bool]  # of `head_cuts`
    EXACT: ClassVar[bool]  # whether float32 calls carry states by exact products

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    C: int
    heads: int
    keys: int
    decay: str
    products: Products
    scale: float

    @classmethod
    def of(cls, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale):
        """Returns the tiling of a call: the longest chunks, then the most heads, that fit VMEM. If
        nothing fits it is the smallest. chunk_size: tokens per chunk, None to choose them."""
        B, T, H, V = v_BTHV.shape
        G, K = k_BTGK.shape[2:]
        decay = kind(log_decay_BTHK, segment_ids=segment_ids_BT)
        narrow = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV))
        best = cls.best_sizes(decay, narrow, K, V)
        # Chunks that nobody asked for may be halved down to 16 tokens.
        C = min(chunk_size or best["chunk_size"], max(16, 1 << (T - 1).bit_length()))
        chunks = [C] if chunk_size else [C >> n for n in range(C.bit_length() - 4)]
        # Channels are padded to half registers, or to whole ones where heads cannot be paired.
        for unit in (64, 128):
            K, V = (-(-x // unit) * unit for x in (K, V))
            per_channel = decay == "per_channel"
            cuts = head_cuts(
                G, H, K, V, best["heads"], per_channel=per_channel, own_keys=cls.OWN_KEYS
            )
            if cuts:
                break
        products = Products(narrow, exact=cls.EXACT and not narrow)
        tilings = [
            cls(B, T, G, H, K, V, C, heads, keys, decay, products, float(scale))
            for C in chunks
            for heads, keys in cuts
        ]
        return next((t for t in tilings if t.vmem_bytes <= VMEM_BYTES), tilings[-1])

    @classmethod
    def best_sizes(cls, decay, narrow, K, V) -> dict[str, int]:
        """Returns the preferred "chunk_size" and "heads", the most value heads per grid step. They
        come from `tuned.json`, or else from `heuristic`. narrow: whether inputs are bfloat16."""
        dtype, shape = "bfloat16" if narrow else "float32", f"{K}x{V} {decay}"
        heuristic = cls.heuristic(decay, narrow, K, V)
        return tuning.lookup(heuristic, cls.OPERATOR, "pallas_tpu", dtype, shape)

    @staticmethod
    def heuristic(decay, narrow, K, V) -> dict[str, int]:
        """Returns the "chunk_size" and "heads" of a call for which `tuned.json` has no entry."""
        raise NotImplementedError

    @property
    def vmem_bytes(self) -> int:
        """Estimates the VMEM that the backward kernel takes, rather too high than too low."""
        raise NotImplementedError

    def _vmem(self, blocks: int, held: int) -> int:
        """Returns the VMEM bytes of a kernel from those of its parts.

        Blocks of q, k, v, do, their gradients and the `blocks` given (bytes) count twice, as they
        are double-buffered; `held`, bytes of scratch and intermediate arrays, counts once.
        """
        rows = 4 * self.keys * self.K + 3 * self.heads * self.V
        return 2 * (self.C * self.dtype.itemsize * rows + blocks) + held

    @property
    def dtype(self):
        return self.products.dtype

    @property
    def per_channel(self) -> bool:
        return self.decay == "per_channel"

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def groups(self) -> int:
        """Returns the grid steps per chunk of a batch row: all value heads over those of a step."""
        return self.H // self.heads

    @property
    def copies(self) -> int:
        """Returns how many value heads of a grid step read the same key head."""
        return self.heads // self.keys

    @property
    def shared(self) -> int:
        """Returns how many grid steps read the same key heads."""
        return self.groups * self.keys // self.G


def unsupported_reason(
    tiling_of, *,
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, initial_state_BHKV, segment_ids_BT, chunk_size, **_,
) -> str | None:  # fmt: skip
    """Returns None if an operator's TPU kernels can run this call, else the reason and a way out.
    tiling_of: the operator's `RecurrenceTiling.of`."""
    named = {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV, "initial_state": initial_state_BHKV}
    for name, x in (named | {"log_decay": log_decay_BTHK}).items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; it takes float32 and bfloat16 ('chunked' takes any)"
    cut = functools.partial(tiling_of, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT)
    wanted = cut(chunk_size, 1.0)
    if wanted.vmem_bytes <= VMEM_BYTES:
        return None
    smaller = [C for C in (256, 128, 64, 32, 16) if C < wanted.C]
    fitting = [C for C in smaller if cut(C, 1.0).vmem_bytes <= VMEM_BYTES]
    return (
        f"K = {q_BTGK.shape[3]}, V = {v_BTHV.shape[3]} and chunks of {wanted.C} take "
        f"{wanted.vmem_bytes >> 20} MiB of VMEM, of {VMEM_BYTES >> 20}: "
        + (f"give chunk_size={fitting[0]}" if fitting else "use 'chunked'")
    )
