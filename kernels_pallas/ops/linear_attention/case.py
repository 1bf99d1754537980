"""How `linear_attention` is called and checked."""

from kernels_pallas.common import decay, regimes
from kernels_pallas.dispatch.case import OperatorCase, checked_dtype


def recurrence_kind(*, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, **others):
    """Kind of a call of a matrix recurrence. A document's start is a decay to nothing, so documents
    without a decay are "per_token"."""
    kind = decay.kind(log_decay_BTHK, segment_ids=segment_ids_BT)
    return kind, checked_dtype(q_BTGK, k_BTGK, v_BTHV)


CASE = OperatorCase(
    positional=("q", "k", "v"),
    inputs=regimes.recurrence,
    kinds=("none", "per_token", "per_channel"),
    kind_of=recurrence_kind,
    packed=lambda kind: kind != "none",
    regimes=("none", "per_head", *regimes.DECAYS),
    rounded=("q", "k", "v"),
    letters="BHGKV",
    float16=("triton",),
)
