"""Linear-time sequence operators on arrays, forward and backward, on CPU, TPU and GPU.

Three recurrences underlie every mixer of `seqmodels`:

    linear_attention    S_t = diag(a_t) S_{t-1} + k_t v_t^T                          o_t = S_t^T q_t
    delta_rule          S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T  o_t = S_t^T q_t
    diagonal_scan       h_t = a_t * h_{t-1} + x_t

`diagonal_plus_low_rank` is the delta rule's general form. `document_sums` is linear attention over
whole documents, without an order in time. Further operators are `softmax_attention`
(full or sliding window, grouped heads), `causal_conv` (short and depthwise), and two losses that
never hold all logits of a language model: `linear_cross_entropy` and `linear_kl_divergence`.

`ops.<operator>.step` decodes one token. `explain` says which implementation serves a call, and why
each better one does not.

Array names end in their axes: B batch, T time, H value heads, G key heads, K key dim, V value dim,
D channels, N chunks, C tokens of a chunk.
"""

from kernels_pallas.dispatch import explain
from kernels_pallas.ops.causal_conv.api import causal_conv
from kernels_pallas.ops.delta_rule.api import delta_rule, diagonal_plus_low_rank
from kernels_pallas.ops.diagonal_scan.api import diagonal_scan
from kernels_pallas.ops.document_sums.api import document_sums
from kernels_pallas.ops.linear_attention.api import linear_attention
from kernels_pallas.ops.linear_cross_entropy.api import (
    TokenDetails,
    linear_cross_entropy,
    linear_kl_divergence,
)
from kernels_pallas.ops.softmax_attention.api import softmax_attention

__all__ = [
    "TokenDetails",
    "causal_conv",
    "delta_rule",
    "diagonal_plus_low_rank",
    "diagonal_scan",
    "document_sums",
    "explain",
    "linear_attention",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "softmax_attention",
]
