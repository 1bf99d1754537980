"""Operators under a mesh with explicit axes (`jax.sharding.AxisType.Explicit`), where an array's
type has its sharding.

Inside an operator the compiler chooses the sharding along those axes, as under a mesh with
automatic ones: chunks, padding and loops have no sharding that anybody could name. Outside, each
dimension of a result is sharded as the arguments' dimension with the same letter.
"""

import functools
import inspect

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def automatic(results, **letters: str):
    """Decorator: makes a function of arrays work under a mesh with explicit axes.

    Letters name dimensions, as in "BTD": each dimension of a result is sharded as the arguments'
    dimension with its letter, or not at all where none has it.

    results: the results' letters, a string each in a pytree, or one string for all results.
    letters: by argument name, the arguments' letters.
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
