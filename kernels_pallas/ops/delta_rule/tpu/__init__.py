"""TPU kernels of `delta_rule`: `run` is the implementation, `unsupported_reason` says which calls
it refuses."""

from kernels_pallas.ops.delta_rule.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
