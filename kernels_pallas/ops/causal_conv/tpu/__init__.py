"""TPU kernels of `causal_conv`: `run` is the implementation, `unsupported_reason` says which calls
it refuses."""

from kernels_pallas.ops.causal_conv.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
