"""Branches chosen as a program runs, one for a whole batch."""

import functools

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def anywhere(flags) -> jax.Array:
    """Whether any flag is set, in any row of a batch that `jax.vmap` adds: it would run both
    branches of a condition for each."""
    return jnp.any(flags)


@anywhere.def_vmap
def _anywhere_in_a_batch(axis_size, batched, flags):
    del axis_size, batched
    return anywhere(flags), False


def either(flag, run, *operands):
    """run(flag, *operands), the flag a Python bool inside; None is False, and no branch."""
    if flag is None:
        return run(False, *operands)
    return jax.lax.cond(
        flag, functools.partial(run, True), functools.partial(run, False), *operands
    )
