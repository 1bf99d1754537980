"""Triton kernels of `linear_attention`: `run`, and `unsupported_reason` for calls it refuses."""

from kernels_pallas.ops.linear_attention.gpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
