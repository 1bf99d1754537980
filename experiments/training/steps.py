"""Builds the jitted functions of a run on its mesh: initial state, training step, evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.launch import distributed
from experiments.training import optimizers, schedules, tasks
from experiments.training.checkpoints import TrainState
from experiments.training.tasks import Batch, Task
from seqmodels import sharding
from seqmodels.array_typing import Array
from seqmodels.modules import stack


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions of a run, jitted for its mesh.

    schedule: step -> learning rate.
    abstract_state: shapes, dtypes and shardings of the TrainState, for restoring into.
    init: (seed, start=the task's) -> TrainState.
    train_step: (state, batch) -> (state, metrics). The given state's buffers are donated.
    token_losses: (evaluated, batch) -> nll_BT, correct_BT, float32, of all tokens, masked or not.
    evaluation_params: (params, opt_state, collections={}) -> what to evaluate with, `evaluated`:
      the parameters or, of a task with further collections, {"params": ..., **collections}.
    model_params: evaluated -> all parameters of `model`.
    variables: evaluated -> what `model.apply` takes: {"params": ..., **collections}.
    """

    model: stack.Stack
    schedule: schedules.Schedule
    abstract_state: TrainState
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    token_losses: Callable[[Any, Batch], tuple[Array, Array]]
    evaluation_params: Callable[..., Any]
    model_params: Callable[[Any], Any]
    variables: Callable[[Any], dict[str, Any]]
    batch_sharding: jax.sharding.Sharding

    @property
    def num_devices(self) -> int:
        return len(self.batch_sharding.device_set)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Returns the global batch on the devices.

        batch: the rows that this process reads.
        Raises ValueError for token ids or classes that the model does not have.
        """
        tasks.check_batch(self.model, batch)
        return distributed.global_batch(self.batch_sharding, batch)


def build(config, seq_len: int, devices=None, task: Task | None = None) -> Program:
    """Returns the Program (jitted functions) of a resolved config. Nothing is compiled yet.

    seq_len: tokens in a row of a batch.
    devices: the devices of the mesh; None is all.
    task: what is trained; None is `tasks.of_config`.

    Raises ValueError where batch, mesh, model, schedule and optimizer do not fit together.
    """
    # Check the batch against mesh and microbatches.
    batch_size = config.data.batch_size
    accumulate = config.train.accumulate
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"train.accumulate is {accumulate}; it must divide data.batch_size, which is "
            f"{batch_size}"
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    options = sharding.Options.from_config(config.get("parallel", {}))
    sharding.check_batch(mesh, batch_size, seq_len, options, accumulate)
    sharding.check_batch(mesh, config.data.get("eval_batch_size") or batch_size, seq_len, options)

    # Make the task, the schedule and the optimizer.
    with sharding.scope(mesh, options):
        task = task or tasks.of_config(config, seq_len)
    schedule = schedules.make_schedule(
        config.schedule, config.optimizer.learning_rate, config.train.steps, batch_size, seq_len
    )
    optimizer = optimizers.make_optimizer(
        config.optimizer, schedule, task.boxed_params, options.offload
    )

    def clip(grads):
        return optimizers.clip(config.optimizer, grads) if options.offload else grads

    def boxed_init(seed, start):
        with sharding.scope(mesh, options):
            params = task.init(jax.random.key(seed), start)
            collections = task.init_collections()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), collections)

    # Lay out the state: parameters by their axes' names, optimizer state as options.zero says, and
    # further collections on every device.
    with sharding.scope(mesh, options):
        collections = jax.eval_shape(task.init_collections)
    if collections and sharding.STAGE_AXIS in mesh.shape and mesh.shape[sharding.STAGE_AXIS] > 1:
        raise ValueError(
            f"the model has {', '.join(collections)} beside its parameters, which a pipeline does "
            f"not carry: set mesh.{sharding.STAGE_AXIS} to 1"
        )
    boxed_state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        task.boxed_params,
        jax.eval_shape(optimizer.init, task.boxed_params),
        collections,
    )
    placement = sharding.Placement(mesh, options, task.boxed_params)
    batch_sharding = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    state_shardings = TrainState(
        replicated,
        placement.params,
        placement.optimizer(boxed_state.opt_state),
        jax.tree.map(lambda _: replicated, collections),
    )
    frozen_shardings = sharding.shardings(mesh, task.boxed_frozen)
    frozen = jax.device_put(task.frozen, frozen_shardings)
    with_frozen = bool(jax.tree.leaves(frozen))

    def compiled(function, in_shardings, **options):
        """Returns function(*arguments, frozen) jitted, with the task's frozen parameters bound."""
        if not with_frozen:

            def alone(*arguments):
                return function(*arguments, frozen)

            alone.__name__ = function.__name__
            return jax.jit(alone, in_shardings=in_shardings, **options)
        jitted = jax.jit(function, in_shardings=(*in_shardings, frozen_shardings), **options)
        return lambda *arguments: jitted(*arguments, frozen)

    def token_losses(evaluated, batch, frozen):
        params, *further = split(evaluated)
        with placement.scope():
            return task.token_losses(params, frozen, batch, *further)

    def split(evaluated):
        """Returns (params,), or (params, collections) of a task that has any."""
        if not collections:
            return (evaluated,)
        return evaluated["params"], {name: evaluated[name] for name in collections}

    def joined(params, further):
        return {"params": params, **further} if collections else params

    averaged = jax.jit(
        lambda params, opt_state: optimizers.evaluation_params(
            params, placement.on_devices(opt_state, boxed_state.opt_state)
        ),
        in_shardings=(state_shardings.params, state_shardings.opt_state),
        out_shardings=state_shardings.params,
    )
    evaluated_shardings = joined(state_shardings.params, state_shardings.collections)

    return Program(
        model=task.model,
        schedule=schedule,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            nn.meta.unbox(boxed_state),
            state_shardings,
        ),
        init=lambda seed, start=task.start: jax.jit(
            lambda seed, start: nn.meta.unbox(boxed_init(seed, start)),
            out_shardings=state_shardings,
        )(seed, start),
        train_step=compiled(
            _train_step(task.loss, optimizer, clip, placement, accumulate),
            (state_shardings, batch_sharding),
            donate_argnums=0,
            out_shardings=(state_shardings, replicated),
        ),
        token_losses=compiled(
            token_losses, (evaluated_shardings, batch_sharding), out_shardings=batch_sharding
        ),
        evaluation_params=lambda params, opt_state, further=(): joined(
            averaged(params, opt_state), further
        ),
        model_params=lambda evaluated: task.model_params(split(evaluated)[0], frozen),
        variables=lambda evaluated: {
            "params": task.model_params(split(evaluated)[0], frozen),
            **(split(evaluated)[1] if collections else {}),
        },
        batch_sharding=batch_sharding,
    )


def _train_step(loss_of, optimizer, clip, placement, accumulate: int):
    """Returns the function (state, batch, frozen) -> (state, metrics) of one optimizer update.

    The loss is the mean over all tokens that the loss mask counts, on all devices and microbatches.
    """

    def loss_and_metrics(params, frozen, batch, weight, collections):
        # `further` is the new collections of a task that has any.
        further = (collections,) if collections else ()
        loss_BT, metrics, *further = loss_of(params, frozen, batch, *further)

        def mean(x_BT):
            return jnp.sum(x_BT * batch["loss_mask"]) / weight

        return mean(loss_BT), (jax.tree.map(mean, metrics), further[0] if further else {})

    def microbatches(x_BT):
        # Each takes every `accumulate`-th row, so that it has rows from all devices.
        return x_BT.reshape(-1, accumulate, *x_BT.shape[1:]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: Batch, frozen):
        weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

        def gradient(batch, collections):
            with placement.scope():
                grads, (metrics, collections) = jax.grad(loss_and_metrics, has_aux=True)(
                    state.params, frozen, batch, weight, collections
                )
            return (placement.reduce(optimizers.widened(grads)), metrics), collections

        if accumulate == 1:
            (grads, metrics), collections = gradient(batch, state.collections)
        else:  # a scan over microbatches, whose gradients are summed in float32
            parts = jax.tree.map(microbatches, batch)
            first = jax.tree.map(lambda x: x[0], parts)
            (_, metrics), _ = jax.eval_shape(gradient, first, state.collections)
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            total = placement.reduce(zeros), jax.tree.map(lambda m: jnp.zeros(()), metrics)

            def add(carry, microbatch):
                total, collections = carry
                found, collections = gradient(microbatch, collections)
                return (jax.tree.map(jnp.add, total, found), collections), None

            ((grads, metrics), collections), _ = jax.lax.scan(
                add, (total, state.collections), parts
            )

        # Update parameters and optimizer state, each where ZeRO and offloading keep it.
        updates, opt_state = placement.update(
            optimizer.update, clip(grads), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(optimizers.widened(params)),
        }
        return TrainState(state.step + 1, params, opt_state, collections), metrics

    return train_step
