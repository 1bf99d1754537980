"""The `softmax_attention` operator: api.py is public, reference.py defines it, the rest are
implementations."""

from kernels_pallas.ops.softmax_attention.api import step

__all__ = ["step"]
