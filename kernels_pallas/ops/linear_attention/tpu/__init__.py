"""TPU kernels of `linear_attention`: `run` is the implementation, `unsupported` says which calls it refuses."""

from kernels_pallas.ops.linear_attention.tpu.launch import run, unsupported

__all__ = ["run", "unsupported"]
