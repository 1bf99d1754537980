"""Triton kernels of `diagonal_scan`: the implementation, and which calls it refuses."""

from kernels_pallas.ops.diagonal_scan.gpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
