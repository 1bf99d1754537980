"""`kernels_pallas.diagonal_scan` and its implementations; `step` decodes one token."""

from kernels_pallas.ops.diagonal_scan.reference import step

__all__ = ["step"]
