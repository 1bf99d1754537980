"""The `causal_conv` operator: api.py is public, reference.py defines it, the rest are
implementations."""

from kernels_pallas.ops.causal_conv.reference import step

__all__ = ["step"]
