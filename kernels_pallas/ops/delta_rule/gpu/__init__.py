"""Triton kernels of `delta_rule`: the implementation, and which calls it refuses."""

from kernels_pallas.ops.delta_rule.gpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
