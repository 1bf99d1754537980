"""Makes what a run trains, a Task, of a config: one for each architecture."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels_pallas import TokenDetails
from seqmodels import language_model, models, operators
from seqmodels.array_typing import Array
from seqmodels.encoder import Encoder
from seqmodels.modules import diffusion, stack
from seqmodels.text import sampling

Batch = dict[str, Array]
Losses = tuple[Array, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Fields of what a run trains: its model, trained and frozen parameters, and losses.

    `of_config` returns the usual one.

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
    init_collections: () -> first values of further collections of Flax, {name: tree}, which a step
      changes and no gradient reaches, such as statistics of batches. Where there are any, `loss`
      and `token_losses` take them as a fourth argument, and `loss` returns their new values as a
      third result.
    """

    model: stack.Stack
    boxed_params: Any
    init: Callable[[Array, Any], Any]
    loss: Callable[..., Any]
    token_losses: Callable[..., tuple[Array, Array]]
    model_params: Callable[[Any, Any], Any] = lambda params, frozen: params
    start: Any = ()
    frozen: Any = ()
    boxed_frozen: Any = ()
    init_collections: Callable[[], dict[str, Any]] = dict


def of_config(config, seq_len: int) -> Task:
    """Returns the Task that trains all parameters of the model that a config describes.

    A language model's loss is the cross-entropy of the labels, with train.z_loss (log Z)^2 added
    per token (PaLM, arXiv 2204.02311, section 5); an encoder's that of its classes; a denoiser's
    the mean over channels of the squared error of what it predicts, with learn_variance plus
    `diffusion.variational_bound`, whose weight 1 is DiT's. Auxiliary losses, scalars that modules
    sow in the collection "losses", are added; each is a metric under its own name, summed over
    layers. The Task's `init` draws parameters if `start` is (); else `start` holds all of them.

    seq_len: tokens in a row.

    Raises ValueError for a model that the config does not describe rightly, and a z_loss without a
    language model.
    """
    return of_model(models.from_config(config.model), seq_len, config.train.get("z_loss", 0.0))


def of_model(model: stack.Stack, seq_len: int, z_loss: float = 0.0) -> Task:
    """Returns the Task that `of_config` describes, of a model that is made already."""
    if isinstance(model, language_model.LanguageModel):
        model.check_length(seq_len)
        # Shapes of parameters depend on no length. Hardly a mesh divides 7 tokens, so that nothing
        # is sent for activations that nobody reads.
        inputs = (jnp.zeros((1, min(seq_len, 7)), jnp.int32),)
        return _of_model(model, inputs, functools.partial(_language_losses, z_loss=z_loss))
    if z_loss:
        raise ValueError(
            f"train.z_loss is {z_loss}, and only language models have one; set it to 0"
        )
    of_encoder = isinstance(model, Encoder)
    ids_BT, E = jnp.ones((1, seq_len), jnp.int32), model.input_dim
    x_BTE = jnp.zeros((1, seq_len, E), jnp.float32)
    if of_encoder:
        return _of_model(model, (0 * ids_BT if model.vocab_size else x_BTE, ids_BT), _class_losses)
    inputs = x_BTE, jnp.zeros((1, seq_len), jnp.float32), 0 * ids_BT, ids_BT
    return _of_model(model, inputs, _denoising_losses)


def _of_model(model, inputs: tuple[Array, ...], losses) -> Task:
    """Returns the Task of a model that `inputs` initialise.

    losses: (model, variables, batch, mutable, training=bool) -> (loss_BT, metrics), and the
      collections `mutable` after the call.
    """

    def variables(key):
        return model.init(key, *inputs)

    def init(key, start=()):
        return start or variables(key)["params"]

    boxed = jax.eval_shape(variables, jax.random.key(0))
    boxed_params = boxed["params"]
    mutable = [name for name in boxed if name != "params"]
    kept = [name for name in mutable if name != stack.LOSSES]

    def init_collections():
        found = variables(jax.random.key(0)) if kept else {}
        return nn.meta.unbox({name: found[name] for name in kept})

    def loss(params, frozen, batch, collections=None):
        found, updated = losses(
            model, {"params": params, **(collections or {})}, batch, mutable, training=True
        )
        loss_BT, metrics = found
        for name, value in auxiliary_losses(updated).items():
            loss_BT = loss_BT + value
            metrics[name] = jnp.broadcast_to(value, loss_BT.shape)
        if not kept:
            return loss_BT, metrics
        return loss_BT, metrics, {name: updated[name] for name in kept}

    def token_losses(params, frozen, batch, collections=None):
        variables = {"params": params, **(collections or {})}
        (_, metrics), _ = losses(model, variables, batch, [], training=False)
        return metrics["loss"], metrics.get("accuracy", jnp.zeros_like(metrics["loss"]))

    return Task(model, boxed_params, init, loss, token_losses, init_collections=init_collections)


def auxiliary_losses(collections: dict[str, Any]) -> dict[str, Array]:
    """Returns {name: sum over layers, a scalar} of what modules sowed in "losses"."""
    found: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(collections.get(stack.LOSSES, {}))[0]:
        name = str(next(key.key for key in reversed(path) if hasattr(key, "key")))
        found[name] = found.get(name, 0.0) + jnp.sum(leaf.astype(jnp.float32))
    return found


def cross_entropy(model, params, batch: Batch, z_loss: float = 0.0) -> tuple[Array, TokenDetails]:
    """Returns every label's cross-entropy loss_BT and its TokenDetails, without whole logits."""
    return _cross_entropy(model, {"params": params}, batch, [], z_loss)[0]


def _cross_entropy(model, variables, batch: Batch, mutable: list[str], z_loss: float):
    def head(x_BTD, matrix, layout):
        return operators.linear_cross_entropy(
            x_BTD, matrix, batch["labels"],
            layout=layout, logit_softcap=model.logit_softcap, z_loss=z_loss,
        )  # fmt: skip

    (losses, _), updated = model.apply(
        variables, batch["inputs"], batch["segment_ids"], head=head, mutable=mutable
    )
    return losses, updated


def _language_losses(model, variables, batch, mutable, *, training, z_loss):
    losses, updated = _cross_entropy(model, variables, batch, mutable, z_loss * training)
    loss_BT, details = losses
    return (loss_BT, {"loss": details.nll_BT, "accuracy": details.correct_BT}), updated


def _class_losses(model, variables, batch, mutable, *, training):
    logits_BTW, updated = model.apply(
        variables, batch["inputs"], batch["segment_ids"], batch.get("coordinates"), mutable=mutable
    )
    # Labels that the loss mask leaves out may be anything.
    label_BT = jnp.clip(batch["labels"], 0, model.num_classes - 1)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTW, label_BT)
    correct_BT = (jnp.argmax(logits_BTW, axis=-1) == label_BT).astype(jnp.float32)
    return (loss_BT, {"loss": loss_BT, "accuracy": correct_BT}), updated


def _denoising_losses(model, variables, batch, mutable, *, training):
    noised_BTE = model.process.noised(batch["inputs"], batch["noise"], batch["time"])
    out, updated = model.apply(
        variables, noised_BTE, batch["time"], batch["labels"], batch["segment_ids"],
        batch.get("coordinates"), mutable=mutable,
    )  # fmt: skip
    return denoising_losses(model, out, batch), updated


def denoising_losses(model, out, batch: Batch) -> Losses:
    """Returns a denoiser's loss_BT of what it returned for a batch, `out`, and metrics by name."""
    x_BTE, noise_BTE, time_BT = batch["inputs"], batch["noise"], batch["time"]
    noised_BTE = model.process.noised(x_BTE, noise_BTE, time_BT)
    out_BTE = out[0] if model.learn_variance else out
    error_BT = jnp.mean(jnp.square(out_BTE - model.process.target(x_BTE, noise_BTE)), axis=-1)
    metrics, loss_BT = {"loss": error_BT}, error_BT
    if model.learn_variance:
        bound_BT = diffusion.variational_bound(
            model.noise_schedule, x_BTE, noised_BTE, *out, time_BT
        )
        loss_BT, metrics["bound"] = loss_BT + bound_BT, bound_BT
    return loss_BT, metrics


def check_batch(model: stack.Stack, batch: dict[str, np.ndarray]) -> None:
    """Raises ValueError for token ids or classes that a model does not have."""
    if isinstance(model, language_model.LanguageModel):
        for name in ("inputs", "labels"):
            sampling.check_ids(model, batch[name])
        return
    if getattr(model, "vocab_size", 0):
        sampling.check_ids(model, batch["inputs"])
    classes = getattr(model, "num_classes", 0)
    least = 0 if isinstance(model, Encoder) else -1
    labels = np.asarray(batch["labels"])[np.asarray(batch["loss_mask"]) > 0]
    outside = labels[(labels < least) | (labels >= classes)]
    if outside.size and classes:
        raise ValueError(
            f"label {outside[0]} is no class of the model, which has {classes}: set "
            "config.model.num_classes to the data's (0)"
        )
