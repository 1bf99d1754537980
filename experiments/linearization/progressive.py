"""Distils a teacher into students whose sum grows: one training run (`training.loop`) per student.

`seqmodels.linearize.ensembles` has the loss. Each student learns from a batch's labels, its teacher
and the students before it, which are frozen; its run's scores are those of the sum with it.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.data import make_dataset
from experiments.linearization import tasks, teachers
from experiments.training import evaluation, loop, restore, run_record, steps
from experiments.training import tasks as training_tasks
from experiments.training.tasks import Task
from seqmodels import encoder, language_model, models
from seqmodels.linearize import batches, ensembles, objectives
from seqmodels.modules import stack

SECTION = "progressive"
_SCORES = ("parameters", "loss", "accuracy")


def progress(config, workdir: str | Path, devices=None) -> dict:
    """Runs all students of `config.progressive`; returns what workdir/result.json also holds.

    workdir/<member> is a student's run, in which `experiments.evaluate` scores that student alone.
    Finished students are not trained again, and an interrupted one resumes from its last
    checkpoint.

    The result has the teacher's scores on the test split, and of each member its parameters and the
    scores of the sum up to it.

    Raises ValueError for a teacher or members without classes or of other sizes than the data's,
    before anything is written, and the errors of `loop.train`.
    """
    workdir, fields = Path(workdir), config.progressive
    if (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds a training run; give the students a folder of their own")
    teacher = _teacher(fields.teacher)
    dataset, length = make_dataset(config.data, "test"), teachers.row_length(config)
    configs = {name: loop.resolve(_member(config, name), dataset) for name in _names(fields)}
    for name, own in configs.items():
        _check(models.from_config(own.model), teacher.model, f"progressive.members.{name}")
    workdir.mkdir(parents=True, exist_ok=True)
    for change in run_record.save_config(workdir, config):
        print(f"changed since this was started, for students that are not done: {change}")

    # Train each student on what the sum of those before it lacks; what is done is read.
    students: list[tasks.Model] = []
    members = {}
    for name, own in configs.items():
        folder = workdir / name
        task = member_task(own, length, fields, teacher, students)
        if not (folder / "result.json").exists():
            loop.train(own, folder, devices, lambda *_, task=task: task)
        result = json.loads((folder / "result.json").read_text())
        members[name] = {score: result[score] for score in _SCORES}
        program = steps.build(own, length, devices, task)
        trained = restore.evaluation_params(program, own, folder)[1]
        students.append(tasks.Model(task.model, program.model_params(trained)))

    scores = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(teacher.params)),
        **_scores(next(iter(configs.values())), teacher, dataset, length, devices),
    }
    result = {"teacher": {name: scores[name] for name in _SCORES}, "members": members}
    run_record.write_json(workdir / "result.json", result)
    return result


def text(result: dict) -> str:
    """Returns the result of `progress` as lines for the terminal, a model each."""
    lines, total = [], 0
    for name, scores in [*result["members"].items(), ("teacher", result["teacher"])]:
        total += scores["parameters"]
        count = scores["parameters"] if name == "teacher" else total
        lines.append(f"{name:<10} {count:>12,} parameters, accuracy {scores['accuracy']:.4f}")
    return "\n".join(lines)


def _scores(config, found: tasks.Model, dataset, length: int, devices) -> dict[str, float]:
    """Returns a model's scores on a split, by itself."""
    program = steps.build(config, length, devices, training_tasks.of_model(found.model, length))
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        found.params,
        program.abstract_state.params,
    )
    return evaluation.evaluate(program, params, dataset, config.train.test_batches).totals()


def member_task(config, seq_len: int, fields, teacher: tasks.Model, before) -> Task:
    """Returns the Task that trains a student beside the frozen sum of the students `before` it.

    config, seq_len: the student's, as `training.tasks.of_config` takes them.
    fields: `config.progressive`, for the weights of the loss.
    """
    usual = training_tasks.of_config(config, seq_len)
    others = {"teacher": teacher} | {f"student_{i}": found for i, found in enumerate(before)}
    frozen = {name: found.params for name, found in others.items()}
    boxed_frozen = {name: batches.boxed_params(found.model) for name, found in others.items()}

    def logits(frozen, name, batch):
        return tasks.logits(tasks.Model(others[name].model, frozen[name]), batch)

    def sum_before(frozen, batch):
        found = [logits(frozen, name, batch) for name in others if name != "teacher"]
        return sum(found[1:], start=found[0]) if found else None

    def labels(own_BTW, batch):  # those that the loss mask leaves out may be anything
        return jnp.clip(batch["labels"], 0, own_BTW.shape[-1] - 1)

    def loss(params, frozen, batch):
        own_BTW = tasks.logits(tasks.Model(usual.model, params), batch)
        return ensembles.loss(
            own_BTW, sum_before(frozen, batch), logits(frozen, "teacher", batch),
            labels(own_BTW, batch),
            kl=fields.kl, temperature=fields.temperature, boost=fields.boost,
        )  # fmt: skip

    def token_losses(params, frozen, batch):
        own_BTW = tasks.logits(tasks.Model(usual.model, params), batch)
        before_BTW = sum_before(frozen, batch)
        total_BTW = own_BTW if before_BTW is None else before_BTW + own_BTW
        _, metrics = objectives.class_distillation(total_BTW, total_BTW, labels(own_BTW, batch))
        return metrics["nll"], metrics["accuracy"]

    return dataclasses.replace(
        usual, loss=loss, token_losses=token_losses, frozen=frozen, boxed_frozen=boxed_frozen
    )


def _names(fields) -> list[str]:
    """Returns the members' names in their order, member_2 before member_10."""
    if not fields.members:
        raise ValueError("progressive.members is empty: name the students, member_1, member_2, ...")
    return sorted(fields.members, key=lambda name: (len(name), name))


def _member(config, name: str) -> ConfigDict:
    """Returns the config of a student's run: the config's model with the member's own fields.

    Raises ValueError for a field that a model does not have.
    """
    own = config.progressive.members[name]
    config = config.copy_and_resolve_references()
    if unknown := sorted(set(own) - set(config.model)):
        raise ValueError(
            f"progressive.members.{name} has {unknown[0]!r}, and config.model {', '.join(config.model)}"
        )
    with config.unlocked(), config.model.ignore_type():
        config.model.update(own)
    config.sample.length = 0
    return config


def _teacher(source: str) -> tasks.Model:
    found = teachers.load(source, {})
    return tasks.Model(found.model, found.params)


def _check(student: stack.Stack, teacher: stack.Stack, what: str) -> None:
    """Raises ValueError unless both models have the same classes, and the student no statistics."""
    sizes = [_classes(model) for model in (student, teacher)]
    if None in sizes or sizes[0] != sizes[1]:
        raise ValueError(
            f"{what}: the student predicts {sizes[0] or 'no'} classes and the teacher "
            f"{sizes[1] or 'no'}: take encoders or language models of the same data"
        )
    try:
        batches.boxed_params(student)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _classes(model: stack.Stack) -> int | None:
    """Returns the number of classes of a model's logits, None of a denoiser."""
    if not isinstance(model, encoder.Encoder | language_model.LanguageModel):
        return None
    return model.num_classes if isinstance(model, encoder.Encoder) else model.vocab_size
