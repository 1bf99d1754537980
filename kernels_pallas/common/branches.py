"""Conditionals at run time that take one branch for a whole batch, under `jax.vmap` too."""

import functools

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(flags) -> jax.Array:
    """Returns whether any of `flags` is True, in any row of a batch that `jax.vmap` adds.

    The result is one boolean for all rows: with one per row, `vmap` would run both branches of a
    condition.
    """
    return jnp.any(flags)


@anywhere.def_vmap
def _anywhere_in_a_batch(axis_size, batched, flags):
    del axis_size, batched
    return anywhere(flags), False


def either(flag, run, *operands):
    """Calls run(True, *operands) or run(False, *operands), as `flag` says when the program runs.

    Both are compiled. A flag of None means False, known at compile time.
    """
    if flag is None:
        return run(False, *operands)
    return jax.lax.cond(
        flag, functools.partial(run, True), functools.partial(run, False), *operands
    )
