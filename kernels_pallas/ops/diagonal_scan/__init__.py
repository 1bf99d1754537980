"""The `diagonal_scan` operator: api.py is public, reference.py defines it, the rest are
implementations."""

from kernels_pallas.ops.diagonal_scan.reference import step

__all__ = ["step"]
