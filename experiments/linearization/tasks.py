"""Turns a stage of a linearization into a Task: parameters to train, and their loss."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.training.tasks import Task, cross_entropy
from seqmodels import language_model
from seqmodels.checkpoints_io import conversion
from seqmodels.linearize import lora, objectives, partition, transfer

OBJECTIVES = ("transfer", "distill")
STUDENT_ONLY = f"/{transfer.STUDENT}/"
_TRANSFER_WEIGHTS = (*transfer.DISTANCES, "attention_map")
_DISTILL_WEIGHTS = ("ce", "kl", "select_weight")


class Model(NamedTuple):
    """Fields of a language model with its parameters."""

    model: language_model.LanguageModel
    params: dict[str, Any]


def make_task(stage, teacher: Model, student: Model) -> Task:
    """Returns the Task of a stage, `config.linearize.stages.<stage>` (configs/linearize/common.py).

    Student parameters whose paths match `train` are trained, those that match `lora` get adapters,
    and all others are frozen. With objective "transfer" the parameters are those of a
    TransferModel, which has converted layers twice, the teacher's and the student's, and only the
    student's can be trained. With "distill" they are the student's, with the teacher's frozen
    beside them.

    Raises ValueError for an unknown objective, a pattern that matches nothing, or a stage that
    trains nothing or has no loss.
    """
    if stage.objective not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {stage.objective!r}; choose one of {', '.join(OBJECTIVES)}"
        )
    if not stage.train and not stage.lora:
        raise ValueError("the stage trains nothing: give `train` or `lora`, patterns of parameters")
    weights = _TRANSFER_WEIGHTS if stage.objective == "transfer" else _DISTILL_WEIGHTS
    if not any(stage[name] for name in weights):
        raise ValueError(
            f"the stage has no loss: a {stage.objective!r} needs a weight for one of {', '.join(weights)}"
        )
    if stage.objective == "transfer":
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

    def token_losses(params, frozen, batch):
        _, details = cross_entropy(model, model_params(params, frozen), batch)
        return details.nll_BT, details.correct_BT

    return Task(
        model, cut.boxed_params, cut.init, loss, token_losses, model_params,
        cut.start, frozen, boxed_frozen,
    )  # fmt: skip


def _transfer_task(stage, teacher, student):
    model = transfer.make_model(teacher.model, student.model)
    both = transfer.params(model, teacher, student)
    cut = _cut(stage, both, conversion.boxed_params(model), lambda path: STUDENT_ONLY in path)
    kept = transfer.kept(model, student)
    boxed_kept = transfer.kept(model, (student.model, conversion.boxed_params(student.model)))
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
    cut = _cut(stage, student.params, conversion.boxed_params(student.model))
    frozen, boxed_frozen = {"student": cut.frozen}, {"student": cut.boxed_frozen}
    if stage.kl:
        frozen["teacher"], boxed_frozen["teacher"] = (
            teacher.params,
            conversion.boxed_params(teacher.model),
        )

    def model_params(params, frozen):
        return cut.whole(params, frozen["student"])

    def loss(params, frozen, batch):
        whole = model_params(params, frozen)
        other = (teacher.model, frozen["teacher"]) if stage.kl else None
        loss_BT, metrics = objectives.distillation(
            (student.model, whole), other, batch,
            ce=stage.ce, kl=stage.kl, temperature=stage.temperature,
        )  # fmt: skip
        if stage.select_weight:
            penalty = objectives.selection_penalty(whole, stage.select_target, stage.select_power)
            loss_BT = loss_BT + stage.select_weight * penalty
            metrics["selection_penalty"] = jnp.broadcast_to(penalty, loss_BT.shape)
        return loss_BT, metrics

    return _task(student.model, cut, loss, model_params, frozen, boxed_frozen)
