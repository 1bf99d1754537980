"""A pipeline over the mesh axis `pipe`: its devices each hold a stage, a run of consecutive layers.

GPipe (arXiv 1811.06965): with S stages and M microbatches the program is one loop of M + S - 1
turns. In turn t, stage s works on microbatch t - s, and hands the result to stage s + 1. In S - 1
of its turns a stage is idle: it works on what nobody reads. Differentiating the loop gives the
backward schedule, with as many turns and twice the work per turn.

With `split_backward` a turn of the backward pass computes only gradients of activations, and saves
the input of every dense layer and the gradient of its output. After all turns these give the dense
kernels' gradients, for all microbatches at once and with no stage idle (2BP, arXiv 2405.18047). The
time is (M + S - 1) p1 + M p2 in place of (M + S - 1) (p1 + p2), where a turn takes p1 for gradients
of activations and p2 for those of weights. The memory is that of these arrays of all microbatches;
from the forward pass only the stages' inputs are saved, and the rest is recomputed.

Stages are a leading axis of arrays, split over `pipe`; handing results to the next stage compiles
to a collective-permute.

Letters: S stages, N layers per stage, M microbatches; in scans over turns the turn comes first.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from kernels_pallas.common.dtypes import custom_vjp
from seqmodels import sharding
from seqmodels.array_typing import Array


class Layer(NamedTuple):
    """A layer of a pipeline: called with (params, index, x_BTD, rows, shared), it returns x_BTD.

    module: the layer as an unbound Flax module.
    call: (apply, index, x_BTD, rows, shared) -> x_BTD, the next hidden states; it runs the module
      by apply(*arguments).
    """

    module: nn.Module
    call: Any

    def __call__(self, params, index, x_BTD, rows, shared) -> Array:
        apply = functools.partial(self.module.apply, {"params": params})
        return self.call(apply, index, x_BTD, rows, shared)

    def observed(self, params, taps, index, x_BTD, rows, shared) -> tuple[Array, dict]:
        """Runs the layer; returns x_BTD, and the inputs of its dense layers as a Flax collection.

        taps: arrays that are added to the outputs of dense layers, so that the gradients of taps
          are those of the outputs. {} adds nothing; then the outputs are returned with the inputs.
        """
        inputs = {}

        def apply(*arguments):
            variables = {"params": params, "taps": taps}
            with nn.intercept_methods(_observe):
                result, seen = self.module.apply(variables, *arguments, mutable=["inputs"])
            inputs.update(seen["inputs"])
            return result

        return self.call(apply, index, x_BTD, rows, shared), inputs


def _observe(next_function, arguments, keywords, context):
    """Flax interceptor for `Layer.observed`: stores dense layers' inputs, and adds taps."""
    y = next_function(*arguments, **keywords)
    module = context.module
    if isinstance(module, nn.Dense) and context.method_name == "__call__":
        module.put_variable("inputs", "x", arguments[0])
        if module.has_variable("taps", "y"):
            y = y + module.get_variable("taps", "y")
        else:
            module.put_variable("inputs", "y", y)
    return y


class _Pipe(NamedTuple):
    """Fields of a pipeline: its layer, and its numbers of stages and of microbatches."""

    layer: Layer
    stages: int
    microbatches: int


def run(layer: Layer, params_L, index_L: Array, x_BTD: Array, rows: Any, shared: Any) -> Array:
    """Returns hidden states x_BTD after L layers, computed in a pipeline on the mesh in scope.

    params_L, index_L: parameters of the layers, stacked along a first axis, and their indices.
    rows: a pytree of arrays (B, ...) that belong to the rows of x_BTD, such as segment ids.
    shared: a pytree of arrays that all layers read.

    Raises:
      ValueError: L is not divisible by the number of stages, or the batch by that of microbatches.
    """
    options, stages = sharding.options(), sharding.stages()
    M = options.microbatches or stages
    pipe = _Pipe(layer, stages, M)
    (L,), B = index_L.shape, x_BTD.shape[0]
    if L % stages:
        raise ValueError(
            f"{L} repeats of the scanned blocks cannot be split over mesh axis "
            f"{sharding.STAGE_AXIS!r} of size {stages}"
        )
    if B % M:
        raise ValueError(
            f"a batch of {B} rows cannot be split into {M} microbatches: "
            "set parallel.microbatches to a divisor"
        )

    def by_stage(leaf_L):
        return leaf_L.reshape(stages, L // stages, *leaf_L.shape[1:])

    def microbatches(leaf_B):
        # Every M-th row, so that each microbatch has rows from all devices.
        return leaf_B.reshape(B // M, M, *leaf_B.shape[1:]).swapaxes(0, 1)

    params_SN, index_SN = jax.tree.map(by_stage, (params_L, index_L))
    x_MBTD, rows_M = jax.tree.map(microbatches, (x_BTD, rows))
    whole = _run_split if options.split_backward else _run
    x_MBTD = whole(pipe, params_SN, shared, x_MBTD, index_SN, rows_M)
    return x_MBTD.swapaxes(0, 1).reshape(x_BTD.shape)


def _run(pipe: _Pipe, params_SN, shared, x_MBTD, index_SN, rows_M):
    return _turns(pipe, params_SN, shared, x_MBTD, index_SN, rows_M)[0]


def _turns(pipe: _Pipe, params_SN, shared, x_MBTD, index_SN, rows_M, keep: bool = False):
    """Returns the hidden states of all microbatches after all stages, and the saved stage inputs.

    The latter, (x, rows) of every stage in every turn, are None without `keep`.
    """

    def stage(params_N, index_N, x_BTD, rows):
        def one(x_BTD, inputs):
            params, index = inputs
            return pipe.layer(params, index, x_BTD, rows, shared), None

        return jax.lax.scan(one, x_BTD, (params_N, index_N))[0]

    # Turn t: microbatch t enters stage 0, every stage takes what the one before made, and all work.
    def turn(held_S, arriving):
        x_SBTD, rows_S = jax.tree.map(_hand_on, held_S, arriving)
        x_SBTD = sharding.constrain_stages(x_SBTD)
        y_SBTD = _all_stages(stage)(params_SN, index_SN, x_SBTD, rows_S)
        return (y_SBTD, rows_S), (y_SBTD, (x_SBTD, rows_S) if keep else None)

    # Idle stages work on a real microbatch, for which every layer is finite: the first one until
    # their own arrives, the last one after it.
    S = pipe.stages
    inputs_M = x_MBTD, rows_M
    held_S = jax.tree.map(lambda leaf_M: jnp.repeat(leaf_M[:1], S, axis=0), inputs_M)
    arriving = jax.tree.map(
        lambda leaf_M: jnp.concatenate([leaf_M, jnp.repeat(leaf_M[-1:], S - 1, axis=0)]), inputs_M
    )
    _, (left_SBTD, entered) = jax.lax.scan(turn, held_S, arriving)
    # Microbatch m leaves the last stage in turn m + S - 1. Taken after the loop, the results come
    # to all devices at once, not turn by turn.
    return left_SBTD[S - 1 :, -1], entered


def _all_stages(stage):
    return jax.vmap(stage, spmd_axis_name=sharding.STAGE_AXIS)


def _hand_on(held_S: Array, arriving: Array, back: bool = False) -> Array:
    """Returns the stages' arrays, each moved to the next stage, with `arriving` at the first.

    back: moves them to the stage before, and `arriving` to the last stage. The shift is by padding,
      which the partitioner compiles to messages between neighbours; concatenation would compile to
      a gather.
    """
    ends = [(0, 0)] * (held_S.ndim - 1)
    handed_S = (
        jnp.pad(held_S[1:], [(0, 1), *ends]) if back else jnp.pad(held_S[:-1], [(1, 0), *ends])
    )
    stage_S = jnp.arange(len(held_S)).reshape(-1, *[1] * (held_S.ndim - 1))
    return jnp.where(stage_S == (len(held_S) - 1 if back else 0), arriving[None], handed_S)


@custom_vjp(0)
def _run_split(pipe: _Pipe, params_SN, shared, x_MBTD, index_SN, rows_M):
    """Returns all microbatches after all stages; weights' gradients come after all others (2BP)."""
    return _run(pipe, params_SN, shared, x_MBTD, index_SN, rows_M)


def _split_forward(pipe, params_SN, shared, x_MBTD, index_SN, rows_M):
    x_MBTD, entered = _turns(pipe, params_SN, shared, x_MBTD, index_SN, rows_M, keep=True)
    return x_MBTD, (params_SN, shared, index_SN, entered)


def _split_backward(pipe, saved, dy_MBTD):
    params_SN, shared, index_SN, entered = saved
    kernels_SN, others_SN, taps_N = _dense_layers(pipe, params_SN, shared, index_SN, entered)

    # A stage's gradients but for its dense kernels: recomputes its layers, and keeps what went into
    # the dense layers and the gradients of what came out, which are those of the taps.
    def stage_gradients(kernels_N, others_N, index_N, x_BTD, rows, dy_BTD):
        def stage(others_N, shared, x_BTD, taps_N):
            def one(x_BTD, inputs):
                kernels, others, taps, index = inputs
                return pipe.layer.observed(
                    _merge(kernels, others), taps, index, x_BTD, rows, shared
                )

            return jax.lax.scan(one, x_BTD, (kernels_N, others_N, taps_N, index_N))

        zeros_N = jax.tree.map(lambda tap: jnp.zeros(tap.shape, tap.dtype), taps_N)
        _, vjp, inputs_N = jax.vjp(stage, others_N, shared, x_BTD, zeros_N, has_aux=True)
        *gradients, outputs_N = vjp(dy_BTD)
        return *gradients, (inputs_N, outputs_N)

    def turn(carry, of_turn):
        sums, dx_SBTD = carry
        (x_SBTD, rows_S), dy_BTD = of_turn
        # Turn t of the forward pass, from the last turn to the first. What stage s made went into
        # stage s + 1 a turn later, so its gradient comes from there.
        dy_SBTD = sharding.constrain_stages(_hand_on(dx_SBTD, dy_BTD, back=True))
        d_others_SN, d_shared_S, dx_SBTD, dense_SN = _all_stages(stage_gradients)(
            kernels_SN, others_SN, index_SN, x_SBTD, rows_S, dy_SBTD
        )
        sums = jax.tree.map(jnp.add, sums, (d_others_SN, d_shared_S))
        return (sums, dx_SBTD), (dx_SBTD[0], dense_SN)

    S, M = pipe.stages, pipe.microbatches
    # Nobody reads what the last stage made in its first S - 1 turns.
    unread = jnp.zeros((S - 1, *dy_MBTD.shape[1:]), dy_MBTD.dtype)
    dy = jnp.concatenate([unread, dy_MBTD])
    sums = (others_SN, jax.tree.map(lambda leaf: jnp.repeat(leaf[None], S, axis=0), shared))
    start = jax.tree.map(jnp.zeros_like, (sums, entered[0][0]))
    ((d_others_SN, d_shared_S), _), (dx, dense) = jax.lax.scan(
        turn, start, (entered, dy), reverse=True
    )

    # The kernels' gradients, x^T dy over all microbatches: stage s had microbatch m in turn s + m.
    def of_microbatches(leaf, stage):
        return jax.lax.dynamic_slice_in_dim(leaf, stage, M)

    def kernel_gradient(x, dy, kernel):
        x, dy = (
            jax.vmap(of_microbatches, (1, 0), spmd_axis_name=sharding.STAGE_AXIS)(
                leaf, jnp.arange(S)
            )
            for leaf in (x, dy)
        )
        d_kernel = jnp.einsum("SMNBTD,SMNBTF->SNDF", x, dy, preferred_element_type=jnp.float32)
        return d_kernel.astype(kernel.dtype)

    inputs, outputs = map(traverse_util.flatten_dict, dense)
    d_kernels_SN = {
        path: kernel_gradient(inputs[path[:-1] + ("x",)], outputs[path[:-1] + ("y",)], kernel)
        for path, kernel in traverse_util.flatten_dict(kernels_SN).items()
    }
    d_params_SN = _merge(traverse_util.unflatten_dict(d_kernels_SN), d_others_SN)
    d_shared = jax.tree.map(lambda leaf_S: jnp.sum(leaf_S, axis=0), d_shared_S)
    return d_params_SN, d_shared, dx[:M], None, None


_run_split.defvjp(_split_forward, _split_backward)


def _dense_layers(pipe, params_SN, shared, index_SN, entered):
    """Returns the dense layers' kernels, all other parameters, and the shapes of a stage's taps.

    Taps (see `Layer.observed`) have the shapes of the dense layers' outputs.
    """
    first = functools.partial(jax.tree.map, lambda leaf: leaf[0, 0])
    x_SBTD, rows_S = entered
    _, seen = jax.eval_shape(
        lambda *arguments: pipe.layer.observed(first(params_SN), {}, *arguments, shared),
        first(index_SN), first(x_SBTD), first(rows_S),
    )  # fmt: skip
    seen: dict[tuple, Any] = traverse_util.flatten_dict(seen)
    N = index_SN.shape[1]
    taps_N = {
        path: jax.ShapeDtypeStruct((N, *y.shape), y.dtype)
        for path, y in seen.items()
        if path[-1] == "y"
    }
    kernels = {path[:-1] + ("kernel",) for path in taps_N}
    flat = traverse_util.flatten_dict(params_SN)
    kernels_SN = {path: leaf for path, leaf in flat.items() if path in kernels}
    others_SN = {path: leaf for path, leaf in flat.items() if path not in kernels}
    return tuple(map(traverse_util.unflatten_dict, (kernels_SN, others_SN, taps_N)))


def _merge(kernels, others):
    flat = traverse_util.flatten_dict(kernels) | traverse_util.flatten_dict(others)
    return traverse_util.unflatten_dict(flat)
