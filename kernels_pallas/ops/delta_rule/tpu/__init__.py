"""TPU kernels of `delta_rule`: `run` is the implementation, `unsupported` says which calls it refuses."""

from kernels_pallas.ops.delta_rule.tpu.launch import run, unsupported

__all__ = ["run", "unsupported"]
