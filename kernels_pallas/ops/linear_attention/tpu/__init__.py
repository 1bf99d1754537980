"""TPU kernels of `linear_attention`: `run` is the implementation, `unsupported_reason` says which
calls it refuses."""

from kernels_pallas.ops.linear_attention.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
