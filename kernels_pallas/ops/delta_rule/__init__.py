"""The `delta_rule` operator and its general form, `diagonal_plus_low_rank`.

`kernels_pallas` has the public functions; the steps here decode one token.
"""

from kernels_pallas.ops.delta_rule.api import step, step_diagonal_plus_low_rank

__all__ = ["step", "step_diagonal_plus_low_rank"]
