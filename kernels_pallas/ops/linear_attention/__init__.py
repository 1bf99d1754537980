"""Linear attention: `kernels_pallas.linear_attention` is public, `step` decodes one token."""

from kernels_pallas.ops.linear_attention.api import step

__all__ = ["step"]
