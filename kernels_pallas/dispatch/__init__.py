"""Choice of an operator's implementation: by name, or the best whose kernels passed their check."""

from kernels_pallas.dispatch.choose import (
    Choice,
    Implementation,
    Operator,
    choose,
    explain,
    recorded,
    run,
)

__all__ = ["Choice", "Implementation", "Operator", "choose", "explain", "recorded", "run"]
