"""A pipeline over the mesh axis `pipe`: each of its devices holds consecutive layers, and microbatches pass through them.

GPipe (arXiv 1811.06965): with P stages and M microbatches, the program is one loop of M + P - 1 turns. In each turn all stages
run at once, each on another microbatch, and then hand their results on. A stage is idle, that is, works on what nobody will
read, in P - 1 of the turns: (P - 1) / (M + P - 1) of the time. Differentiating the loop gives the backward schedule.

Stages are a leading axis of arrays, split over `pipe`; the compiler makes handing on a collective-permute.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels import sharding
from seqmodels.array_typing import Array

Layer = Callable[[Any, Any, Array, Any, Any], Array]


def run(layer: Layer, params_L, index_L: Array, x_BTD: Array, rows: Any, shared: Any) -> Array:
    """x_BTD after `layer(params, index, x_BTD, rows, shared)` for each of L stacked layers, in the pipeline of the mesh in scope.

    rows: a pytree of arrays (B, ...) that go with x_BTD. shared: a pytree that all layers read.

    Raises:
      ValueError: L is not divisible by the stages, or the batch by the microbatches.
    """
    stages = sharding.stages()
    count = sharding.options().microbatches or stages
    (L,), B = index_L.shape, x_BTD.shape[0]
    if L % stages:
        raise ValueError(
            f"{L} repeats of the scanned blocks cannot be split over mesh axis {sharding.STAGE_AXIS!r} of size {stages}"
        )
    if B % count:
        raise ValueError(
            f"a batch of {B} rows cannot be split into {count} microbatches: set parallel.microbatches to a divisor"
        )

    def stage(params_N, index_N, x_BTD, rows, shared):
        def one(x_BTD, inputs):
            return layer(*inputs, x_BTD, rows, shared), None

        return jax.lax.scan(one, x_BTD, (params_N, index_N))[0]

    def by_stage(leaf_L):
        return leaf_L.reshape(stages, L // stages, *leaf_L.shape[1:])

    def microbatches(leaf_B):
        # Every `count`-th row, so that each microbatch has rows from all devices.
        return leaf_B.reshape(B // count, count, *leaf_B.shape[1:]).swapaxes(0, 1)

    params_SN, index_SN = jax.tree.map(by_stage, (params_L, index_L))
    all_stages = jax.vmap(stage, in_axes=(0, 0, 0, 0, None), spmd_axis_name=sharding.STAGE_AXIS)
    inputs_M = jax.tree.map(microbatches, (x_BTD, rows))

    def turn(held_S, arriving):
        held_S = jax.tree.map(_hand_on, held_S, arriving)
        x_SBTD, rows_S = held_S
        x_SBTD = sharding.constrain_stages(x_SBTD)
        x_SBTD = all_stages(params_SN, index_SN, x_SBTD, rows_S, shared)
        return (x_SBTD, rows_S), x_SBTD[-1]

    # What is worked on and not read is a real microbatch, for which every layer is finite.
    first = jax.tree.map(lambda leaf_M: leaf_M[0], inputs_M)
    held_S = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (stages, *leaf.shape)), first)
    last = jax.tree.map(lambda leaf_M: jnp.repeat(leaf_M[-1:], stages - 1, axis=0), inputs_M)
    inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), inputs_M, last)
    _, x_MBTD = jax.lax.scan(turn, held_S, inputs)
    return x_MBTD[stages - 1 :].swapaxes(0, 1).reshape(x_BTD.shape)


def _hand_on(held_S: Array, arriving: Array) -> Array:
    """Each stage's array to the next stage, and what arrives to the first."""
    return jnp.concatenate([arriving[None], held_S[:-1]])
