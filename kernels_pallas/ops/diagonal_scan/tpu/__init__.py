"""TPU kernels of `diagonal_scan`: `run`, and `unsupported_reason` for calls it refuses."""

from kernels_pallas.ops.diagonal_scan.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
