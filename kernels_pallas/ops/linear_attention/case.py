"""The test inputs of `linear_attention`, and the kinds of call with which it is checked."""

from kernels_pallas.common import decay, regimes
from kernels_pallas.dispatch.case import OperatorCase, checked_dtype


def recurrence_kind(*, q_BTGK, k_BTGK, v_BTHV, log_decay_BTHK, segment_ids_BT, **others):
    """Returns the kind of decay of a matrix recurrence's call, and the dtype of the check for it.

    Documents without a decay are "per_token", as a document's start is a reset.
    """
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
