"""Parameters, and what the mesh and the optimizer must know of each.

`Module.init` returns every parameter in a box, `nn.LogicallyPartitioned`. It holds the logical
names of the axes, which `seqmodels.sharding` maps to the mesh. A subclass of it, `Kernel` or
`Undecayed`, says how the parameter is optimised.

Names in use: "embed" (D), "heads" (heads times head dim, or heads), "mlp" (F), "vocab" (W), "norm",
"layers".
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.common.dtypes import custom_vjp
from seqmodels.array_typing import Array, DType, LogicalAxes

KERNEL_INIT = nn.initializers.lecun_normal()


class Kernel(nn.LogicallyPartitioned):
    """A box for a matrix (input, output) between activations, whose update Muon orthogonalises."""


class Undecayed(nn.LogicallyPartitioned):
    """A box for a gate's parameter, a gain or a bias: never weight-decayed, whatever its rank."""


def is_boxed(leaf: Any) -> bool:
    """Returns whether a node of a parameter tree is a box; for tree functions' `is_leaf`."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def kernel(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns the initializer with its arrays put into `Kernel` boxes."""
    return lambda *args, **keywords: Kernel(init(*args, **keywords), axes)


def partitioned(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns the initializer with its arrays put into boxes that hold only axis names."""
    return nn.with_logical_partitioning(init, axes)


def undecayed(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns the initializer with its arrays put into `Undecayed` boxes."""
    return lambda *args, **keywords: Undecayed(init(*args, **keywords), axes)


def dense(
    features: int,
    name: str,
    *,
    axes: LogicalAxes,
    kernel_init: Callable = KERNEL_INIT,
    bias_init: Callable = nn.initializers.zeros,
    **keywords,
) -> nn.Dense:
    """Returns an nn.Dense whose kernel has the logical `axes` (input, output)."""
    return nn.Dense(
        features,
        kernel_init=kernel(kernel_init, axes),
        bias_init=undecayed(bias_init, axes[-1:]),
        name=name,
        dot_general=_product,
        **keywords,
    )


def _product(x, kernel_DF, dimension_numbers, precision=None):
    """Multiplies x's last axis by the kernel's first: a `dot_general` for nn.Dense."""
    del dimension_numbers
    return _dense_product(precision, x, kernel_DF)


@custom_vjp(0)
def _dense_product(precision, x, kernel_DF):
    return jnp.einsum("...D,DF->...F", x, kernel_DF, precision=precision)


def _dense_product_forward(precision, x, kernel_DF):
    return _dense_product(precision, x, kernel_DF), (x, kernel_DF)


def _dense_product_backward(precision, operands, dy):
    """Computes the kernel's gradient as x^T dy.

    By JAX's own order, (dy^T x)^T, XLA's CPU backend computes dy once more, transposed.
    """
    x, kernel_DF = operands
    dx = jnp.einsum("...F,DF->...D", dy, kernel_DF, precision=precision)
    tokens = tuple(range(x.ndim - 1))
    dkernel_DF = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision=precision)
    return dx, dkernel_DF


_dense_product.defvjp(_dense_product_forward, _dense_product_backward)


def recomputed(function: Callable) -> Callable:
    """Returns `function`, whose backward pass keeps its arguments only and computes it again.

    For functions that act element by element or row by row: computing a gate again costs less than
    writing and reading the four to six arrays that JAX would keep.
    """
    return jax.checkpoint(function, prevent_cse=False)


def gated(x: Array, gate: Array, activation: Callable[[Array], Array]) -> Array:
    """Returns x * activation(gate), of equal shapes, `recomputed`."""
    return recomputed(lambda x, gate: x * activation(gate))(x, gate)


def gate_parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """Makes a small parameter of a gate (A_log, dt_bias, D, ...), whose first axis is "heads".

    It is float32 whatever the model's dtype, and never weight-decayed.
    """
    axes = ("heads",) + (None,) * (len(shape) - 1)
    return module.param(name, undecayed(init, axes), shape, jnp.float32)


class Matrix(nn.Module):
    """Makes a dense layer's kernel (input features, features), for another module to use."""

    features: int
    axes: LogicalAxes
    param_dtype: DType

    @nn.compact
    def __call__(self, input_features: int) -> Array:
        init = partitioned(KERNEL_INIT, self.axes)
        return self.param("kernel", init, (input_features, self.features), self.param_dtype)
