"""TPU kernels of `delta_rule`: `run`, and `unsupported_reason` for calls it refuses."""

from kernels_pallas.ops.delta_rule.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
