"""Choosing an implementation: by name, or the best that has matched the chunked form on this kind
of device."""

from kernels_pallas.dispatch.choose import Implementation, choose, run

__all__ = ["Implementation", "choose", "run"]
