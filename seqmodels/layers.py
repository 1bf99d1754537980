"""Parameters with logical axis names, which `seqmodels.sharding` maps to the mesh.

Names in use: "embed" (D), "heads" (heads times head dim, or heads), "mlp" (F), "vocab" (W), "norm", "layers".
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.array_typing import Array, DType, LogicalAxes

KERNEL_INIT = nn.initializers.lecun_normal()


def dense(
    features: int,
    name: str,
    *,
    axes: LogicalAxes,
    kernel_init: Callable = KERNEL_INIT,
    bias_init: Callable = nn.initializers.zeros,
    **keywords,
) -> nn.Dense:
    """nn.Dense whose kernel has the logical `axes` (input, output)."""
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[-1:]),
        name=name,
        **keywords,
    )


def gate_parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """A small parameter of a gate (A_log, dt_bias, D, ...): float32 whatever the model's dtype, first axis "heads"."""
    axes = ("heads",) + (None,) * (len(shape) - 1)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Matrix(nn.Module):
    """The kernel of a dense layer without a bias, where the product is another's: kernel (D, features)."""

    features: int
    axes: LogicalAxes
    param_dtype: DType

    @nn.compact
    def __call__(self, input_features: int) -> Array:
        init = nn.with_logical_partitioning(KERNEL_INIT, self.axes)
        return self.param("kernel", init, (input_features, self.features), self.param_dtype)
