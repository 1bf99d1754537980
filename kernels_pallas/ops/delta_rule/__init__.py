"""The `delta_rule` operator: api.py is public, reference.py defines it, the rest are
implementations."""

from kernels_pallas.ops.delta_rule.api import (
    delta_rule,
    diagonal_plus_low_rank,
    step,
    step_diagonal_plus_low_rank,
)

__all__ = ["delta_rule", "diagonal_plus_low_rank", "step", "step_diagonal_plus_low_rank"]
