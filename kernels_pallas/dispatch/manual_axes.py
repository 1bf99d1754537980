"""Support of `jax.shard_map`, whose `check_vma` tracks the manual mesh axes that an array varies
over, as a part of its type.

Loops require that what they carry keeps its type, and custom derivatives that a cotangent has the
type of its operand. So every operator first makes its operands alike; the transpose of that sums
the gradient of a replicated operand over the devices that used it. Arrays that an operator makes
itself, such as zeros to start from, it makes like an operand (`jnp.zeros_like` keeps the type).
Without the check, or outside shard_map, nothing varies and nothing is done.
"""

from collections.abc import Collection

import jax
import numpy as np
from jax import lax


def varying(tree) -> frozenset[str]:
    """Returns the names of the manual mesh axes that some array of a pytree varies over."""
    axes = (jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree) if _is_array(x))
    return frozenset().union(*axes)


def alike(tree, axis_name: str | Collection[str] = ()):
    """Returns a pytree with every array made to vary over the same manual mesh axes.

    These are axis_name (one name or several) and all axes that any of the arrays varies over.
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    axes = varying(tree).union(names)

    def cast(x):
        missing = tuple(sorted(axes - varying(x))) if _is_array(x) else ()
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def shapes(outputs, inputs) -> list[jax.ShapeDtypeStruct]:
    """Returns a `jax.ShapeDtypeStruct` for each result of a kernel.

    outputs: anything with the results' shapes and dtypes. inputs: the kernel's arrays, whose first
      one gives the mesh axes that the results vary over.
    """
    axes = jax.typeof(inputs[0]).manual_axis_type
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in outputs]


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray)
