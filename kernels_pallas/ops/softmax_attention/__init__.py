"""`kernels_pallas.softmax_attention` and its implementations; `step` decodes one token."""

from kernels_pallas.ops.softmax_attention.api import step

__all__ = ["step"]
