"""The `linear_attention` operator: api.py is public, reference.py defines it, the rest are
implementations."""

from kernels_pallas.ops.linear_attention.api import linear_attention, step

__all__ = ["linear_attention", "step"]
