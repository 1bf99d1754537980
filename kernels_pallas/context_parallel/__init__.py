"""Context parallelism: the operators of `kernels_pallas` with time split over a mesh axis."""

from kernels_pallas.context_parallel.operators import (
    associative_scan,
    causal_conv,
    delta_rule,
    diagonal_plus_low_rank,
    diagonal_scan,
    linear_attention,
    shift,
    softmax_attention,
)
from kernels_pallas.context_parallel.ring_attention import zigzag_order
from kernels_pallas.context_parallel.whole_documents import document_sums

__all__ = [
    "associative_scan",
    "causal_conv",
    "delta_rule",
    "diagonal_plus_low_rank",
    "diagonal_scan",
    "document_sums",
    "linear_attention",
    "shift",
    "softmax_attention",
    "zigzag_order",
]
