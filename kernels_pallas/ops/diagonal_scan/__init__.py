"""The diagonal recurrence: `kernels_pallas.diagonal_scan` is public, `step` decodes one token."""

from kernels_pallas.ops.diagonal_scan.reference import step

__all__ = ["step"]
