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
from experiments.training import optimizers, schedules
from experiments.training.checkpoints import TrainState
from kernels_pallas import TokenDetails
from seqmodels import language_model, operators, sharding
from seqmodels.array_typing import Array
from seqmodels.text import sampling

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """Fields of what a run trains: its model, trained and frozen parameters, and losses.

    `language_modelling` returns the usual one.

    boxed_params: the parameters that are trained and saved, as shapes, boxed with the names of
      their logical axes.
    init: (key, start) -> values of these parameters, boxed or not.
    loss: (params, frozen, batch) -> loss_BT, metrics. The mean of loss_BT over the tokens that the
      loss mask counts is differentiated. The metrics, one of them "loss", are (B, T) each, averaged
      alike.
    token_losses: (params, frozen, batch) -> nll_BT, correct_BT of `model`, for evaluation.
    model_params: (params, frozen) -> all parameters of `model`.
    start: arrays that `init` begins from.
    frozen, boxed_frozen: parameters that losses read and no step changes. They are not saved, and
      have no optimizer state.
    """

    model: language_model.LanguageModel
    boxed_params: Any
    init: Callable[[Array, Any], Any]
    loss: Callable[[Any, Any, Batch], tuple[Array, dict[str, Array]]]
    token_losses: Callable[[Any, Any, Batch], tuple[Array, Array]]
    model_params: Callable[[Any, Any], Any] = lambda params, frozen: params
    start: Any = ()
    frozen: Any = ()
    boxed_frozen: Any = ()


def language_modelling(config, seq_len: int) -> Task:
    """Returns the Task that trains all parameters of a config's language model by cross-entropy.

    The loss per token adds train.z_loss (log Z)^2 (PaLM, arXiv 2204.02311, section 5). The Task's
    `init` draws parameters if `start` is (); else `start` holds all of them.
    """
    model = language_model.from_config(config.model)
    model.check_length(seq_len)

    def init(key, start=()):
        if start:
            return start
        # Shapes of parameters depend on no length. Hardly a mesh divides 7 tokens, so that nothing
        # is sent for activations that nobody reads.
        return model.init(key, jnp.zeros((1, min(seq_len, 7)), jnp.int32))["params"]

    def loss(params, frozen, batch):
        loss_BT, details = cross_entropy(model, params, batch, config.train.z_loss)
        return loss_BT, {"loss": details.nll_BT, "accuracy": details.correct_BT}

    def token_losses(params, frozen, batch):
        _, details = cross_entropy(model, params, batch)
        return details.nll_BT, details.correct_BT

    return Task(model, jax.eval_shape(init, jax.random.key(0)), init, loss, token_losses)


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions of a run, jitted for its mesh.

    schedule: step -> learning rate.
    abstract_state: shapes, dtypes and shardings of the TrainState, for restoring into.
    init: (seed, start=the task's) -> TrainState.
    train_step: (state, batch) -> (state, metrics). The given state's buffers are donated.
    token_losses: (params, batch) -> nll_BT, correct_BT, float32, of all tokens, masked or not.
    evaluation_params: (params, opt_state) -> the parameters to evaluate with.
    model_params: result of evaluation_params -> all parameters of `model`.
    """

    model: language_model.LanguageModel
    schedule: schedules.Schedule
    abstract_state: TrainState
    init: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    token_losses: Callable[[Any, Batch], tuple[Array, Array]]
    evaluation_params: Callable[[Any, Any], Any]
    model_params: Callable[[Any], Any]
    batch_sharding: jax.sharding.Sharding

    @property
    def num_devices(self) -> int:
        return len(self.batch_sharding.device_set)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Returns the global batch on the devices.

        batch: the rows that this process reads.
        Raises ValueError for token ids that the model does not have.
        """
        for name in ("inputs", "labels"):
            sampling.check_ids(self.model, batch[name])
        return distributed.global_batch(self.batch_sharding, batch)


def build(config, seq_len: int, devices=None, task: Task | None = None) -> Program:
    """Returns the Program (jitted functions) of a resolved config. Nothing is compiled yet.

    seq_len: tokens in a row of a batch.
    devices: the devices of the mesh; None is all.
    task: what is trained; None is `language_modelling`.

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
        task = task or language_modelling(config, seq_len)
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
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    # Lay out the state: parameters by their axes' names, optimizer state as options.zero says.
    boxed_state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        task.boxed_params,
        jax.eval_shape(optimizer.init, task.boxed_params),
    )
    placement = sharding.Placement(mesh, options, task.boxed_params)
    state_shardings = TrainState(
        sharding.replicated(mesh), placement.params, placement.optimizer(boxed_state.opt_state)
    )
    batch_sharding = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
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

    def token_losses(params, batch, frozen):
        with placement.scope():
            return task.token_losses(params, frozen, batch)

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
            token_losses, (state_shardings.params, batch_sharding), out_shardings=batch_sharding
        ),
        evaluation_params=jax.jit(
            lambda params, opt_state: optimizers.evaluation_params(
                params, placement.on_devices(opt_state, boxed_state.opt_state)
            ),
            in_shardings=(state_shardings.params, state_shardings.opt_state),
            out_shardings=state_shardings.params,
        ),
        model_params=lambda params: task.model_params(params, frozen),
        batch_sharding=batch_sharding,
    )


def cross_entropy(model, params, batch: Batch, z_loss: float = 0.0) -> tuple[Array, TokenDetails]:
    """Returns every label's cross-entropy loss_BT and its TokenDetails, without whole logits."""

    def head(x_BTD, matrix, layout):
        return operators.linear_cross_entropy(
            x_BTD, matrix, batch["labels"],
            layout=layout, logit_softcap=model.logit_softcap, z_loss=z_loss,
        )  # fmt: skip

    losses, _ = model.apply({"params": params}, batch["inputs"], batch["segment_ids"], head=head)
    return losses


def _train_step(loss_of, optimizer, clip, placement, accumulate: int):
    """Returns the function (state, batch, frozen) -> (state, metrics) of one optimizer update.

    The loss is the mean over all tokens that the loss mask counts, on all devices and microbatches.
    """

    def loss_and_metrics(params, frozen, batch, weight):
        loss_BT, metrics = loss_of(params, frozen, batch)

        def mean(x_BT):
            return jnp.sum(x_BT * batch["loss_mask"]) / weight

        return mean(loss_BT), jax.tree.map(mean, metrics)

    def microbatches(x_BT):
        # Each takes every `accumulate`-th row, so that it has rows from all devices.
        return x_BT.reshape(-1, accumulate, x_BT.shape[1]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: Batch, frozen):
        weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

        def gradient(batch):
            with placement.scope():
                grads, metrics = jax.grad(loss_and_metrics, has_aux=True)(
                    state.params, frozen, batch, weight
                )
            return placement.reduce(optimizers.widened(grads)), metrics

        if accumulate == 1:
            grads, metrics = gradient(batch)
        else:  # a scan over microbatches, whose gradients are summed in float32
            parts = jax.tree.map(microbatches, batch)
            _, metrics = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            total = placement.reduce(zeros), jax.tree.map(lambda m: jnp.zeros(()), metrics)

            def add(total, microbatch):
                return jax.tree.map(jnp.add, total, gradient(microbatch)), None

            (grads, metrics), _ = jax.lax.scan(add, total, parts)

        # Update parameters and optimizer state, each where ZeRO and offloading keep it.
        updates, opt_state = placement.update(
            optimizer.update, clip(grads), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(optimizers.widened(params)),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
