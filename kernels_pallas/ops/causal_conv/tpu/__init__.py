"""TPU kernels of `causal_conv`: `run`, and `unsupported_reason` for calls it refuses."""

from kernels_pallas.ops.causal_conv.tpu.launch import run, unsupported_reason

__all__ = ["run", "unsupported_reason"]
