"""TPU kernels of `causal_conv`: the implementation, and which calls it refuses."""

from kernels_pallas.ops.causal_conv.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
