"""Softmax attention: `kernels_pallas.softmax_attention` is public, `step` decodes one token."""

from kernels_pallas.ops.softmax_attention.api import step

__all__ = ["step"]
