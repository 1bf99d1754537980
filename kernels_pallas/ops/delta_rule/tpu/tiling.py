"""How the delta rule's TPU kernels cut a call: chunk, heads a grid step, and the VMEM that takes."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.common.decay import kind
from kernels_pallas.dispatch import devices, tuning
from kernels_pallas.tpu.primitives import Products, head_cuts

CHUNK_SIZE = 128
FLOAT32_CHUNK_SIZE = 32  # as `chunked`: where beta is 2, longer ones lose accuracy
# Value heads a grid step, where they fit and `tuned.json` says nothing else: they fill each other's
# gaps (`tpu_blocks.in_turns`).
HEADS = {"none": 8, "per_token": 8, "per_channel": 4}
# libtpu 0.0.42 packs a TPU7x's bundles in a time that grows much faster than their number: four
# heads with a decay per channel took 77 s for one pass of the backward kernel, two take 13 s for
# everything.
TPU7X_HEADS = {"none": 4, "per_token": 4, "per_channel": 2}
FLOAT32_HEADS = 2  # it is there to be exact: a smaller kernel compiles sooner
VMEM_BYTES = 40 << 20  # what a kernel may take: every part has 64 MiB a core, or more


class Tiling(NamedTuple):
    """Sizes of one call, and how it is cut: hashable, chosen before tracing. K and V are whole 64s.

    heads: value heads a grid step; keys: key heads a grid step.
    decay: "none", "per_token" or "per_channel".
    """

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

    @property
    def chunks(self):
        return -(-self.T // self.C)

    @property
    def copies(self):
        """Value heads of a step that read one key head."""
        return self.heads // self.keys

    @property
    def groups(self):
        return self.H // self.heads

    @property
    def shared(self):
        """Grid steps that read the same key heads."""
        return self.groups * self.keys // self.G

    @property
    def vmem_bytes(self):
        """What the backward kernel takes: blocks twice, for they are fetched ahead; states; what
        the algebra holds."""
        item = 2 if self.products.narrow else 4
        keys, values, state = self.keys * self.K, self.heads * self.V, self.K * self.V
        blocks = self.C * item * (4 * keys + 3 * values) + 12 * self.heads * state
        arrays = 32
        if self.decay == "per_channel":
            blocks += 8 * self.C * self.heads * self.K
            arrays = 80
        wide = max(self.C, self.K, self.V, 128)  # a narrower array fills its lanes all the same
        states = 4 if self.products.narrow else 24
        held = arrays * self.C * wide + states * self.K * max(self.V, 128)
        return 2 * blocks + 4 * self.heads * held


def best_sizes(decay, narrow, K, V) -> dict[str, int]:
    """Chunk size and most heads a grid step, for a call that gives no chunk size."""
    heuristic = {"chunk_size": FLOAT32_CHUNK_SIZE, "heads": FLOAT32_HEADS}
    if narrow:
        heads = (TPU7X_HEADS if devices.current().kind == "TPU7x" else HEADS)[decay]
        heuristic = {"chunk_size": CHUNK_SIZE, "heads": heads}
    dtype, shape = "bfloat16" if narrow else "float32", f"{K}x{V} {decay}"
    return tuning.lookup(heuristic, "delta_rule", "pallas_tpu", dtype, shape)


def tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale) -> Tiling:
    """How a call is cut: as many heads a step as fit."""
    B, T, H, V = v_BTHV.shape
    G, K = k_BTGK.shape[2:]
    narrow = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV))
    products = Products(narrow, exact=not narrow)
    decay = kind(log_decay_BTHK, segment_ids=segment_ids_BT)
    best = best_sizes(decay, narrow, K, V)
    C = min(chunk_size or best["chunk_size"], max(16, 1 << (T - 1).bit_length()))
    for unit in (64, 128):
        K, V = (-(-x // unit) * unit for x in (K, V))
        per_channel = decay == "per_channel"
        cuts = head_cuts(G, H, K, V, best["heads"], per_channel=per_channel, own_keys=True)
        if cuts:
            break
    tilings = [Tiling(B, T, G, H, K, V, C, *cut, decay, products, float(scale)) for cut in cuts]
    return next((tiling for tiling in tilings if tiling.vmem_bytes <= VMEM_BYTES), tilings[-1])


def unsupported_reason(
    *, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, initial_state_BHKV, chunk_size, **_
) -> str | None:  # fmt: skip
    """Why the kernels cannot run a call, and what comes nearest."""
    named = {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV, "initial_state": initial_state_BHKV}
    for name, x in named.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; it takes float32 and bfloat16 ('chunked' takes any)"

    def tiling(chunk_size):
        return tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, 1.0)

    wanted = tiling(chunk_size)
    if wanted.vmem_bytes <= VMEM_BYTES:
        return None
    smaller = [C for C in (256, 128, 64, 32, 16) if C < wanted.C]
    fitting = [C for C in smaller if tiling(C).vmem_bytes <= VMEM_BYTES]
    advice = f"give chunk_size={fitting[0]}" if fitting else "use 'chunked', or smaller heads"
    return (
        f"K = {q_BTGK.shape[3]}, V = {v_BTHV.shape[3]} and chunks of {wanted.C} take about "
        f"{wanted.vmem_bytes >> 20} MiB of VMEM, of {VMEM_BYTES >> 20}: {advice}"
    )
