"""Choice of an operator's implementation: the one that a call names, or the best one whose kernels
passed their check on this kind of device.
"""

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
