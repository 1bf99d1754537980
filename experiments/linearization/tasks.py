"""Turns a stage of a linearization into a Task: parameters to train, and their loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.training import tasks as training_tasks
from experiments.training.tasks import Task
from seqmodels import denoiser, encoder, language_model
from seqmodels.linearize import batches, lora, objectives, partition, transfer
from seqmodels.modules import stack

OBJECTIVES = ("transfer", "distill")
STUDENT_ONLY = f"/{transfer.STUDENT}/"
_TRANSFER_WEIGHTS = (*transfer.DISTANCES, "attention_map")


class Model(NamedTuple):
    """Fields of a model of any architecture with its parameters."""

    model: Any
    params: dict[str, Any]


def make_task(stage, teacher: Model, student: Model) -> Task:
    """Returns the Task of a stage, `config.linearize.stages.<stage>` (configs/linearize/common.py).

    Student parameters whose paths match `train` are trained, those that match `lora` get adapters,
    and all others are frozen. With objective "transfer" the parameters are those of a model of
    Pairs, which has converted layers twice, the teacher's and the student's, and only the student's
    can be trained. With "distill" they are the student's, with the teacher's frozen beside them;
    the losses are those of the architecture. Auxiliary losses that modules sow are not added.

    Raises ValueError for an unknown objective, a pattern that matches nothing, a stage that trains
    nothing or has no loss, or a loss of another architecture.
    """
    if stage.objective not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {stage.objective!r}; choose one of {', '.join(OBJECTIVES)}"
        )
    if not stage.train and not stage.lora:
        raise ValueError("the stage trains nothing: give `train` or `lora`, patterns of parameters")
    transferring = stage.objective == "transfer"
    weights = _TRANSFER_WEIGHTS if transferring else _distillation(student.model).weights
    every = {name for kind in _DISTILLATIONS.values() for name in kind.weights}
    others = sorted(name for name in every if name not in weights and stage[name])
    if others and not transferring:
        raise ValueError(
            f"{others[0]} is {stage[others[0]]}, and a distillation of this kind of model has the "
            f"losses {', '.join(weights)}: set it to 0"
        )
    if not any(stage[name] for name in weights):
        raise ValueError(
            f"the stage has no loss: a {stage.objective!r} needs a weight for one of {', '.join(weights)}"
        )
    if transferring:
        return _transfer_task(stage, teacher, student)
    return _distill_task(stage, teacher, student)


@dataclasses.dataclass(frozen=True)
class _TrainedAndFrozen:
    """Parameters in two trees: trained ones, with LoRA adapters, and frozen ones.

    start, frozen: values of the trained and of the frozen ones.
    boxed_start, boxed_frozen: the same as boxed shapes.
    boxed_lora: the parameters among which `stage.lora` selects those to adapt.
    """

    start: dict[str, Any]
    frozen: dict[str, Any]
    boxed_start: dict[str, Any]
    boxed_frozen: dict[str, Any]
    boxed_lora: dict[str, Any]
    stage: Any

    def init(self, key, start):
        trained = {"trained": start} if start else {}
        if self.boxed_lora:
            rank = self.stage.lora_rank
            trained["lora"] = lora.init(key, self.boxed_lora, self.stage.lora, rank)
        return trained

    @property
    def boxed_params(self):
        adapters = jax.eval_shape(lambda key: self.init(key, {}), jax.random.key(0))
        return adapters | ({"trained": self.boxed_start} if self.start else {})

    def whole(self, params, frozen):
        tree = partition.merge(frozen, params.get("trained", {}))
        if "lora" in params:
            tree = lora.merge(tree, params["lora"], self.stage.lora_alpha)
        return tree


def _cut(stage, params, boxed, allowed=lambda path: True) -> _TrainedAndFrozen:
    """Returns parameters split into trained and frozen by the stage's patterns of paths."""
    eligible, _ = partition.split(params, allowed)
    partition.require(eligible, stage.train, "train")
    partition.require(eligible, stage.lora, "lora")
    matched = partition.matches(stage.train)
    cuts = [partition.split(tree, lambda p: allowed(p) and matched(p)) for tree in (params, boxed)]
    (start, frozen), (boxed_start, boxed_frozen) = cuts
    boxed_lora = partition.split(boxed, allowed)[0] if stage.lora else {}
    return _TrainedAndFrozen(start, frozen, boxed_start, boxed_frozen, boxed_lora, stage)


def _task(model, cut: _TrainedAndFrozen, loss, model_params, frozen, boxed_frozen) -> Task:
    """Returns the Task that trains the parameters `cut` by `loss` and evaluates `model`."""
    usual = training_tasks.of_model(model, batches.EXAMPLE_LENGTH)

    def token_losses(params, frozen, batch):
        return usual.token_losses(model_params(params, frozen), (), batch)

    return Task(
        model, cut.boxed_params, cut.init, loss, token_losses, model_params,
        cut.start, frozen, boxed_frozen,
    )  # fmt: skip


def _transfer_task(stage, teacher, student):
    model = transfer.make_model(teacher.model, student.model)
    both = transfer.params(model, teacher, student)
    cut = _cut(stage, both, batches.boxed_params(model), lambda path: STUDENT_ONLY in path)
    kept = transfer.kept(model, student)
    boxed_kept = transfer.kept(model, (student.model, batches.boxed_params(student.model)))
    weights = {name: stage[name] for name in _TRANSFER_WEIGHTS}

    def loss(params, frozen, batch):
        whole = cut.whole(params, frozen["pairs"])
        return objectives.transfer_loss(model, whole, batch, weights)

    def model_params(params, frozen):
        whole = cut.whole(params, frozen["pairs"])
        return transfer.student_params(model, student.model, whole, frozen["kept"])

    frozen = {"pairs": cut.frozen, "kept": kept}
    boxed_frozen = {"pairs": cut.boxed_frozen, "kept": boxed_kept}
    return _task(student.model, cut, loss, model_params, frozen, boxed_frozen)


def _distill_task(stage, teacher, student):
    cut = _cut(stage, student.params, batches.boxed_params(student.model))
    frozen, boxed_frozen = {"student": cut.frozen}, {"student": cut.boxed_frozen}
    kind = _distillation(student.model)
    taught = any(stage[name] for name in kind.weights if name not in ("ce", "select_weight"))
    if taught:
        frozen["teacher"] = teacher.params
        boxed_frozen["teacher"] = batches.boxed_params(teacher.model)

    def model_params(params, frozen):
        return cut.whole(params, frozen["student"])

    def loss(params, frozen, batch):
        own = Model(student.model, model_params(params, frozen))
        theirs = Model(teacher.model, frozen["teacher"]) if taught else None
        return kind.losses(stage, own, theirs, batch)

    return _task(student.model, cut, loss, model_params, frozen, boxed_frozen)


def _language_losses(stage, student: Model, teacher: Model | None, batch):
    loss_BT, metrics = objectives.distillation(
        student, teacher, batch, ce=stage.ce, kl=stage.kl, temperature=stage.temperature
    )
    if stage.select_weight:
        penalty = objectives.selection_penalty(
            student.params, stage.select_target, stage.select_power
        )
        loss_BT = loss_BT + stage.select_weight * penalty
        metrics["selection_penalty"] = jnp.broadcast_to(penalty, loss_BT.shape)
    return loss_BT, metrics


def logits(model: Model, batch) -> Any:
    """Returns the logits (B, T, W) of an encoder or a language model on a batch."""
    found = model.model.apply({"params": model.params}, *batches.arguments(model.model, batch))
    return found if isinstance(model.model, encoder.Encoder) else found[0]


def _class_losses(stage, student: Model, teacher: Model | None, batch):
    own_BTW = logits(student, batch)
    # Labels that the loss mask leaves out may be anything.
    labels_BT = jnp.clip(batch["labels"], 0, own_BTW.shape[-1] - 1)
    return objectives.class_distillation(
        own_BTW, logits(teacher, batch) if teacher else own_BTW, labels_BT,
        ce=stage.ce, kl=stage.kl, temperature=stage.temperature,
    )  # fmt: skip


def _denoising_losses(stage, student: Model, teacher: Model | None, batch):
    features = bool(stage.features)
    own = objectives.denoised(*student, batch, features)
    out = own[:2] if student.model.learn_variance else own.prediction_BTE
    loss_BT, metrics = training_tasks.denoising_losses(student.model, out, batch)
    loss_BT = stage.ce * loss_BT
    if teacher:
        loss_BT, distances = objectives.denoising_distillation(
            loss_BT, own, objectives.denoised(*teacher, batch, features),
            noise=stage.noise, variance=stage.variance, features=stage.features,
        )  # fmt: skip
        metrics |= distances
    return loss_BT, metrics


class _Distillation(NamedTuple):
    """Fields of a distillation's losses: names of their weights, "ce" the own one's, and they."""

    weights: tuple[str, ...]
    losses: Callable[..., training_tasks.Losses]


_DISTILLATIONS = {
    language_model.LanguageModel: _Distillation(("ce", "kl", "select_weight"), _language_losses),
    encoder.Encoder: _Distillation(("ce", "kl"), _class_losses),
    denoiser.Denoiser: _Distillation(("ce", "noise", "variance", "features"), _denoising_losses),
}


def _distillation(model: stack.Stack) -> _Distillation:
    return next(found for kind, found in _DISTILLATIONS.items() if isinstance(model, kind))
