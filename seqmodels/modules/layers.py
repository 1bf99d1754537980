"""Dense layers and parameters, boxed with what the mesh and the optimizer must know of each.

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
    """A box for a dense layer's matrix (input, output); Muon orthogonalises its updates."""


class Undecayed(nn.LogicallyPartitioned):
    """A box for a parameter without weight decay: a gate's, a gain or a bias, of any rank."""


def is_boxed(leaf: Any) -> bool:
    """Returns whether a node of a parameter tree is a box; serves as `is_leaf` of jax.tree.map."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def kernel(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns an initializer that puts the array of `init` into a `Kernel` box with these axes."""
    return lambda *args, **keywords: Kernel(init(*args, **keywords), axes)


def partitioned(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns an initializer that puts the array of `init` into a plain box with these axes."""
    return nn.with_logical_partitioning(init, axes)


def undecayed(init: Callable, axes: LogicalAxes) -> Callable:
    """Returns an initializer that puts the array of `init` into an `Undecayed` box."""
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
    """Returns an nn.Dense of `features` outputs, its parameters boxed with logical axis names.

    axes: names of the kernel's input and output axis, which `sharding.RULES` map to the mesh.
    """
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
    """Returns the gradients of x and of the kernel, the latter as x^T dy.

    JAX's own order, (dy^T x)^T, makes XLA's CPU backend compute dy a second time, transposed.
    """
    x, kernel_DF = operands
    dx = jnp.einsum("...F,DF->...D", dy, kernel_DF, precision=precision)
    tokens = tuple(range(x.ndim - 1))
    dkernel_DF = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), precision=precision)
    return dx, dkernel_DF


_dense_product.defvjp(_dense_product_forward, _dense_product_backward)


def recomputed(function: Callable) -> Callable:
    """Decorator: saves only the function's arguments for the backward pass, which runs it again.

    It is for functions that act element by element or row by row: computing a gate again costs less
    than writing and reading the four to six arrays that JAX would save.
    """
    return jax.checkpoint(function, prevent_cse=False)


def gated(x: Array, gate: Array, activation: Callable[[Array], Array]) -> Array:
    """Returns x * activation(gate) for arrays of one shape; the backward pass computes it again."""
    return recomputed(lambda x, gate: x * activation(gate))(x, gate)


def gate_parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """Makes and returns a small parameter of a gate (A_log, dt_bias, D, ...), in float32.

    Its first axis is sharded as "heads", and it has no weight decay. name: the parameter's name in
    `module`.
    """
    axes = ("heads",) + (None,) * (len(shape) - 1)
    return module.param(name, undecayed(init, axes), shape, jnp.float32)


class Matrix(nn.Module):
    """Makes a matrix without multiplying by it: a call on input_features returns (input, output).

    features: the output size. axes: logical names of both axes.
    """

    features: int
    axes: LogicalAxes
    param_dtype: DType

    @nn.compact
    def __call__(self, input_features: int) -> Array:
        init = partitioned(KERNEL_INIT, self.axes)
        return self.param("kernel", init, (input_features, self.features), self.param_dtype)
