"""TPU kernels of `causal_conv`: `run` is the implementation, `unsupported` says which calls it refuses."""

from kernels_pallas.ops.causal_conv.tpu.launch import run, unsupported

__all__ = ["run", "unsupported"]
