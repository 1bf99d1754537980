"""Cuts a delta-rule call into blocks for its TPU kernels, and estimates their VMEM."""

import functools

from kernels_pallas.dispatch import devices
from kernels_pallas.tpu import tiling
from kernels_pallas.tpu.tiling import VMEM_BYTES, RecurrenceTiling

__all__ = ["VMEM_BYTES", "Tiling", "tiling_of", "unsupported_reason"]

CHUNK_SIZE = 128
FLOAT32_CHUNK_SIZE = 32  # as in `chunked`: where beta is 2, longer ones lose accuracy
# Value heads per grid step: they fill each other's gaps (`primitives.in_turns`).
HEADS = {"none": 8, "per_token": 8, "per_channel": 4}
# libtpu 0.0.42 packs a TPU7x's bundles in a time that grows much faster than their number
# (docs/results.md).
TPU7X_HEADS = {"none": 4, "per_token": 4, "per_channel": 2}
FLOAT32_HEADS = 2  # float32 is there to be exact: a smaller kernel compiles sooner


class Tiling(RecurrenceTiling):
    """Sizes of one delta-rule call on a TPU: chunk length, heads per grid step, padded K and V."""

    OPERATOR = "delta_rule"
    OWN_KEYS = EXACT = True

    @staticmethod
    def heuristic(decay, narrow, K, V):
        if not narrow:
            return {"chunk_size": FLOAT32_CHUNK_SIZE, "heads": FLOAT32_HEADS}
        heads = (TPU7X_HEADS if devices.current().kind == "TPU7x" else HEADS)[decay]
        return {"chunk_size": CHUNK_SIZE, "heads": heads}

    @property
    def vmem_bytes(self):
        blocks = 12 * self.heads * self.K * self.V  # states, first and last ones
        if self.per_channel:
            blocks += 8 * self.C * self.heads * self.K
        # What the algebra holds; an array of fewer lanes than 128 fills them all the same.
        arrays = 80 if self.per_channel else 32
        states = 4 if self.products.narrow else 24
        held = arrays * self.C * max(self.C, self.K, self.V, 128)
        held += states * self.K * max(self.V, 128)
        return self._vmem(blocks, 4 * self.heads * held)


tiling_of = Tiling.of
unsupported_reason = functools.partial(tiling.unsupported_reason, tiling_of)
