"""Operators under a mesh with explicit axes (`jax.sharding.AxisType.Explicit`), where an array's
type has its sharding.

Inside an operator those axes are the compiler's, as they are under a mesh with automatic ones:
chunks, padding and loops have no sharding that anybody could name. The results are sharded as their
letters are in the arguments.
"""

import functools
import inspect

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def automatic(results, **letters: str):
    """Decorates a function of arrays so that it works under a mesh with explicit axes.

    results: the letters of the results, a pytree of strings, or one for all. letters: those of the
    arguments, as far as results take theirs from them.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*positional, **keywords):
            mesh = jax.sharding.get_abstract_mesh()
            if not mesh.explicit_axes:
                return function(*positional, **keywords)
            given = inspect.signature(function).bind(*positional, **keywords).arguments
            arrays = {n: x for n, x in given.items() if isinstance(x, jax.Array | np.ndarray)}
            others = {n: x for n, x in given.items() if n not in arrays}
            axes = {}
            for name in letters.keys() & arrays.keys():
                axes |= zip(letters[name], jax.typeof(arrays[name]).sharding.spec)

            def sharding(result):
                return NamedSharding(mesh, PartitionSpec(*(axes.get(x) for x in result)))

            local = jax.sharding.auto_axes(
                lambda arrays: function(**arrays, **others),
                out_sharding=jax.tree.map(sharding, results),
            )
            return local(arrays)

        return call

    return decorate
