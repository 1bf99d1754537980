"""How a call of linear attention is cut for the TPU kernels: chunk, heads a grid step, what VMEM
that takes."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.common.decay import kind
from kernels_pallas.dispatch import tuning
from kernels_pallas.ops.linear_attention.tpu import per_channel, per_token
from kernels_pallas.tpu.primitives import head_cuts

# Value heads a grid step, where they fit and `tuned.json` says nothing else: one head's chain of
# products fills another's gaps. More help little and take longer to compile; float32, whose
# products are six times as long, gets half, and large states two.
HEADS = {"none": 4, "per_token": 4, "per_channel": 2}
LARGE = 256 * 256  # K V from which a state counts as large
VMEM_BYTES = 40 << 20  # what a kernel may take: every part has 64 MiB a core or more


class Tiling(NamedTuple):
    """Sizes of one call, and how it is cut. K and V are whole 64s; T is whole chunks.

    heads, keys: value and key heads a grid step. shared: grid steps that read the same key head.
    decay: "none", "per_token" or "per_channel". narrow: the inputs are bfloat16.
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
    narrow: bool
    scale: float

    @property
    def chunks(self):
        return self.T // self.C

    @property
    def shared(self):
        return max(1, self.H // self.G // self.heads)

    @property
    def state(self):
        """The state's shape in VMEM: a decay per channel multiplies along the lanes."""
        return (self.V, self.K) if self.decay == "per_channel" else (self.K, self.V)

    @property
    def dtype(self):
        return jnp.bfloat16 if self.narrow else jnp.float32

    @property
    def chunk(self):
        """The module with a chunk's algebra."""
        return per_channel if self.decay == "per_channel" else per_token

    @property
    def vmem_bytes(self):
        """What the backward kernel takes, a little more than less: blocks twice, for they are
        fetched ahead; the states; and what of a chunk's arrays does not stay in registers."""
        item = jnp.dtype(self.dtype).itemsize
        lanes = max(self.K, 128), max(self.V, 128)
        keys, values, state = self.keys * self.K, self.heads * self.V, lanes[0] * lanes[1]
        gates = self.heads * (self.K if self.decay == "per_channel" else 8)
        blocks = self.C * (item * (4 * keys + 3 * values) + 8 * gates)
        blocks += self.heads * state * (8 + item)
        held = 4 * self.shared * self.heads * state + 8 * self.C * keys
        if self.decay == "per_channel":
            arrays = 32 * self.heads * self.C * max(self.C, lanes[0])
        else:
            arrays = 24 * self.C * max(self.C, *lanes)
        return 2 * blocks + held + (4 if self.narrow else 8) * arrays


def best_chunk_size(decay, narrow, K, V) -> int:
    """Fewest static cycles on v6e. A longer chunk touches the state less often and its own pairs
    more, which cost most where they decay: 256 pays without a decay (forward and backward 4.1
    against 4.9 cycles a token and head at K = V = 128), and with one a head where the state is
    large (14.0 against 17.1 at K = 256, V = 512; 8.4 against 7.9 at 128)."""
    if narrow and (decay == "none" or (decay == "per_token" and K * V >= LARGE)):
        return 256
    return 128


def best_sizes(decay, narrow, K, V) -> dict[str, int]:
    """Chunk size and most heads a grid step, for a call that gives no chunk size."""
    most = HEADS[decay] if narrow else HEADS[decay] // 2
    if K * V >= LARGE:
        most = min(most, 2)
    heuristic = {"chunk_size": best_chunk_size(decay, narrow, K, V), "heads": most}
    dtype, shape = "bfloat16" if narrow else "float32", f"{K}x{V} {decay}"
    return tuning.lookup(heuristic, "linear_attention", "pallas_tpu", dtype, shape)


def tiling_of(q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, chunk_size, scale) -> Tiling:
    """How a call is cut: the first choice that fits VMEM, or the last."""
    B, T, H, V = v_BTHV.shape
    G, K = k_BTGK.shape[2:]
    decay = kind(log_decay_BTHK, segment_ids=segment_ids_BT)
    narrow = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV))
    best = best_sizes(decay, narrow, K, V)
    C = min(chunk_size or best["chunk_size"], max(16, 1 << (T - 1).bit_length()))
    sizes = [C] if chunk_size else [C >> n for n in range(C.bit_length() - 4)]
    for unit in (64, 128):
        K, V = (-(-x // unit) * unit for x in (K, V))
        cuts = head_cuts(G, H, K, V, best["heads"], per_channel=decay == "per_channel")
        if cuts:
            break
    tilings = [
        Tiling(B, -(-T // C) * C, G, H, K, V, C, *cut, decay, narrow, scale)
        for C in sizes
        for cut in cuts
    ]
    return next((tiling for tiling in tilings if tiling.vmem_bytes <= VMEM_BYTES), tilings[-1])


def unsupported_reason(*, q_BTGK, k_BTGK, v_BTHV, initial_state_BHKV, **others) -> str | None:
    """Why the kernels cannot run a call, and what comes nearest."""
    names = {"q": q_BTGK, "k": k_BTGK, "v": v_BTHV, "initial_state": initial_state_BHKV}
    for name, x in (names | {"log_decay": others["log_decay_BTHK"]}).items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; it takes float32 and bfloat16 ('chunked' takes any)"
    arguments = {key: others[key] for key in ("log_decay_BTHK", "segment_ids_BT")}

    def tiling(chunk_size):
        return tiling_of(q_BTGK, k_BTGK, v_BTHV, **arguments, chunk_size=chunk_size, scale=1.0)

    def needs(chunk_size):
        return tiling(chunk_size).vmem_bytes

    given = others["chunk_size"]
    if needs(given) <= VMEM_BYTES:
        return None
    K, V, C = q_BTGK.shape[3], v_BTHV.shape[3], tiling(given).C
    fits = [c for c in (C >> n for n in range(1, C.bit_length() - 4)) if needs(c) <= VMEM_BYTES]
    return (
        f"K = {K}, V = {V} and chunks of {C} take {needs(given) >> 20} MiB of VMEM, of {VMEM_BYTES >> 20}: "
        + (f"give chunk_size={fits[0]}" if fits else "use 'chunked'")
    )
