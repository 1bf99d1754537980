"""The test inputs of `document_sums`, and the kinds of call with which it is checked."""

from kernels_pallas.common import regimes
from kernels_pallas.dispatch.case import OperatorCase, checked_dtype

LEAST_BLOCK = 16  # tokens of a block that has a state of its own where rows are not packed


def kind_of(*, q_BTGK, k_BTGK, v_BTHV, block_ids_BT, block_size, **others):
    """Returns the kind of a call ("row", "blocks" or "packed"), and the dtype of its check."""
    del others
    kind = "row" if block_size is None else "blocks"
    kind = kind if block_ids_BT is None else "packed"
    return kind, checked_dtype(q_BTGK, k_BTGK, v_BTHV)


def options(regime: str, shape) -> dict:
    """Returns the keywords of a regime: "blocks of 32" and "blocks" are block-causal."""
    words = regime.split()
    if words[:2] == ["blocks", "of"]:
        return {"block_size": int(words[2])}
    return {"block_size": max(LEAST_BLOCK, shape.T // 3)} if words[0] == "blocks" else {}


CASE = OperatorCase(
    positional=("q", "k", "v"),
    inputs=regimes.recurrence,
    kinds=("row", "blocks", "packed"),
    kind_of=kind_of,
    options=options,
    further_calls=lambda kind, shape: (
        {" in blocks": {"block_size": shape.T // 8}} if kind == "packed" else {}
    ),
    packed=lambda kind: kind == "packed",
    regimes=("whole", "blocks of 7", "blocks of 32"),
    rounded=("q", "k", "v"),
    letters="BHGKV",
)
