"""TPU kernels of `diagonal_scan`: `run` is the implementation, `unsupported` says which calls it refuses."""

from kernels_pallas.ops.diagonal_scan.tpu.launch import run, unsupported

__all__ = ["run", "unsupported"]
