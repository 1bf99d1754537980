"""Conditionals at run time, with one branch for a whole batch."""

import functools

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(flags) -> jax.Array:
    """Returns whether any flag is set, in any row of a batch that `jax.vmap` adds.

    With a flag per row, `vmap` would run both branches of a condition for each row.
    """
    return jnp.any(flags)


@anywhere.def_vmap
def _anywhere_in_a_batch(axis_size, batched, flags):
    del axis_size, batched
    return anywhere(flags), False


def either(flag, run, *operands):
    """Returns run(flag, *operands) for a traced flag, both branches compiled; None is False."""
    if flag is None:
        return run(False, *operands)
    return jax.lax.cond(
        flag, functools.partial(run, True), functools.partial(run, False), *operands
    )
