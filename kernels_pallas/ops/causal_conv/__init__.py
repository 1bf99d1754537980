"""Short causal convolution: `kernels_pallas.causal_conv` is public, `step` decodes one token."""

from kernels_pallas.ops.causal_conv.reference import step

__all__ = ["step"]
