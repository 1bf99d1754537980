"""The compiled parts of an experiment: initial state, training step, evaluation sums; and how they lie on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import distributed, optimizers, schedules
from experiments.checkpoints import TrainState
from kernels_pallas import TokenDetails
from seqmodels import language_model, operators, sharding
from seqmodels.array_typing import Array

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config means, ready to run.

    abstract_state: shapes, dtypes and shardings of the TrainState, for restoring into.
    init: seed -> TrainState.   train_step: (state, batch) -> (state, metrics); the state given is donated.
    token_losses: (params, batch) -> nll_BT, correct_BT (float32), wherever the mask is.
    evaluation_params: (params, opt_state) -> what to evaluate and sample with.
    """

    model: language_model.LanguageModel
    schedule: schedules.Schedule
    abstract_state: TrainState
    init: Callable[[int], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    token_losses: Callable[[Any, Batch], tuple[Array, Array]]
    evaluation_params: Callable[[Any, Any], Any]
    batch_sharding: jax.sharding.Sharding

    @property
    def num_devices(self) -> int:
        return len(self.batch_sharding.device_set)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """The global batch on the devices, of which each process has its rows."""
        return distributed.global_batch(self.batch_sharding, batch)


def build(config, seq_len: int, devices=None) -> Program:
    """The Program of a resolved config whose batches have `seq_len` tokens a row, on `devices` (None: all). Compiles nothing.

    Raises ValueError for what does not fit together.
    """
    batch_size = config.data.batch_size
    accumulate = config.train.accumulate
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"train.accumulate is {accumulate}; it must divide data.batch_size, which is {batch_size}"
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    options = sharding.Options(**config.get("parallel", {}))
    sharding.check_batch(mesh, batch_size, seq_len, options, accumulate)
    sharding.check_batch(mesh, config.data.get("eval_batch_size") or batch_size, seq_len, options)
    model = language_model.from_config(config.model)
    schedule = schedules.make_schedule(
        config.schedule, config.optimizer.learning_rate, config.train.steps, batch_size, seq_len
    )

    def init_params(key):
        # Seven tokens: hardly a mesh divides them, so that nothing is sent for values that nobody reads.
        tokens_BT = jnp.zeros((1, min(seq_len, 7)), jnp.int32)
        with sharding.scope(mesh, options):
            return model.init(key, tokens_BT)["params"]

    boxed_params = jax.eval_shape(init_params, jax.random.key(0))
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, boxed_params, options.offload)

    def clip(grads):
        return optimizers.clip(config.optimizer, grads) if options.offload else grads

    def boxed_init(seed):
        params = init_params(jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    boxed_state = jax.eval_shape(boxed_init, 0)
    placement = sharding.Placement(mesh, options, boxed_params)
    state_shardings = TrainState(
        sharding.replicated(mesh), placement.params, placement.optimizer(boxed_state.opt_state)
    )
    batch_sharding = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    return Program(
        model=model,
        schedule=schedule,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            nn.meta.unbox(boxed_state),
            state_shardings,
        ),
        init=jax.jit(lambda seed: nn.meta.unbox(boxed_init(seed)), out_shardings=state_shardings),
        train_step=jax.jit(
            _train_step(model, optimizer, clip, placement, accumulate, config.train.z_loss),
            donate_argnums=0,
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=(state_shardings, replicated),
        ),
        token_losses=jax.jit(
            lambda params, batch: _nll_and_correct(model, placement, params, batch),
            in_shardings=(state_shardings.params, batch_sharding),
            out_shardings=batch_sharding,
        ),
        evaluation_params=jax.jit(
            lambda params, opt_state: optimizers.evaluation_params(
                params, placement.on_devices(opt_state, boxed_state.opt_state)
            ),
            in_shardings=(state_shardings.params, state_shardings.opt_state),
            out_shardings=state_shardings.params,
        ),
        batch_sharding=batch_sharding,
    )


def _token_losses(model, params, batch: Batch, z_loss: float = 0.0) -> tuple[Array, TokenDetails]:
    """The loss of each target, and its details, with only a piece of the logits held at once."""

    def head(x_BTD, matrix, layout):
        return operators.linear_cross_entropy(
            x_BTD, matrix, batch["targets"],
            layout=layout, logit_softcap=model.logit_softcap, z_loss=z_loss,
        )  # fmt: skip

    losses, _ = model.apply({"params": params}, batch["inputs"], batch["segment_ids"], head=head)
    return losses


def _nll_and_correct(model, placement, params, batch: Batch) -> tuple[Array, Array]:
    with placement.scope():
        _, details = _token_losses(model, params, batch)
    return details.nll_BT, details.correct_BT


def _train_step(model, optimizer, clip, placement, accumulate: int, z_loss: float):
    """One update. The loss is the mean over all tokens that count, on all devices and in all microbatches, plus z_loss times the mean
    of (log Z)^2 (PaLM, arXiv 2204.02311, section 5)."""

    def loss_and_correct(params, batch, weight):
        loss_BT, details = _token_losses(model, params, batch, z_loss)

        def mean(x_BT):
            return jnp.sum(x_BT * batch["loss_mask"]) / weight

        return mean(loss_BT), (mean(details.nll_BT), mean(details.correct_BT))

    def microbatches(x_BT):
        # Every `accumulate`-th row, so that each microbatch has rows from all devices.
        return x_BT.reshape(-1, accumulate, x_BT.shape[1]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: Batch):
        weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

        def gradient(*arguments):
            with placement.scope():
                grads, aux = jax.grad(loss_and_correct, has_aux=True)(*arguments)
            return placement.reduce(grads), aux

        if accumulate == 1:
            grads, (loss, correct) = gradient(state.params, batch, weight)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            zeros = placement.reduce(zeros)

            def add(total, microbatch):
                part = gradient(state.params, microbatch, weight)
                return jax.tree.map(jnp.add, total, part), None

            total = (zeros, (jnp.zeros(()), jnp.zeros(())))
            (grads, (loss, correct)), _ = jax.lax.scan(
                add, total, jax.tree.map(microbatches, batch)
            )
        updates, opt_state = placement.update(
            optimizer.update, clip(grads), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": correct,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
