"""Cuts a linear-attention call into blocks for its TPU kernels, and estimates their VMEM."""

import functools

from kernels_pallas.tpu import tiling
from kernels_pallas.tpu.tiling import VMEM_BYTES, RecurrenceTiling

__all__ = ["VMEM_BYTES", "Tiling", "tiling_of", "unsupported_reason"]

# Value heads per grid step: the chain of products of one head fills the gaps of another's. More
# help little and take longer to compile; float32, whose products are six times as long, gets half,
# and large states two.
HEADS = {"none": 4, "per_token": 4, "per_channel": 2}
LARGE = 256 * 256  # K V from which a state counts as large


class Tiling(RecurrenceTiling):
    """Sizes of one linear-attention call on a TPU: chunk length, heads per grid step, K and V."""

    OPERATOR = "linear_attention"
    OWN_KEYS = EXACT = False

    @staticmethod
    def heuristic(decay, narrow, K, V):
        """Returns the chunk size and heads per grid step with the fewest static cycles on v6e.

        A longer chunk touches the state less often and its own pairs of tokens more, which cost
        most where they decay: 256 tokens pay without a decay, and with one per token where the
        state is large.
        """
        large = K * V >= LARGE
        most = HEADS[decay] if narrow else HEADS[decay] // 2
        long = narrow and (decay == "none" or (decay == "per_token" and large))
        return {"chunk_size": 256 if long else 128, "heads": min(most, 2) if large else most}

    @property
    def state_shape(self) -> tuple[int, int]:
        """Returns the state's shape in VMEM: (V, K) if decay is per channel, else (K, V)."""
        return (self.V, self.K) if self.per_channel else (self.K, self.V)

    @property
    def vmem_bytes(self):
        lanes = max(self.K, 128), max(self.V, 128)
        state = lanes[0] * lanes[1]
        # Blocks: decays and their gradients, states that enter chunks, first and last states.
        gates = 8 * self.C * self.heads * (self.K if self.per_channel else 8)
        states = self.heads * state * (8 + self.dtype.itemsize)
        # Held: cotangents of states, sums over steps that share a key head, and what of a chunk's
        # arrays does not stay in registers.
        held = 4 * self.shared * self.heads * state + 8 * self.C * self.keys * self.K
        if self.per_channel:
            arrays = 32 * self.heads * self.C * max(self.C, lanes[0])
        else:
            arrays = 24 * self.C * max(self.C, *lanes)
        arrays *= 4 if self.products.narrow else 8
        return self._vmem(gates + states, held + arrays)


tiling_of = Tiling.of
unsupported_reason = functools.partial(tiling.unsupported_reason, tiling_of)
