"""TPU kernels of `linear_attention`: the implementation, and which calls it refuses."""

from kernels_pallas.ops.linear_attention.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
