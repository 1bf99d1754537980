"""Runs a linearization from teacher to student: one training run (`training.loop`) per stage."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.data import make_dataset
from experiments.inference import pretrained
from experiments.linearization import tasks, teachers
from experiments.training import loop, restore, run_record, steps
from experiments.training.checkpoints import Checkpoints, TrainState
from seqmodels import language_model, loading, models
from seqmodels.checkpoints_io import Pretrained, own_layout
from seqmodels.linearize import batches, layer_trees, students
from seqmodels.modules import pattern, stack


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Fields of a linearization's plan: which layers are converted, stage by stage.

    stages: names of the stages, in order.
    specs: per stage, the mixers of all the student's layers in it.
    converted: the mixers of all layers of the final student.
    """

    stages: tuple[str, ...]
    specs: tuple[tuple[pattern.MixerSpec, ...], ...]
    converted: tuple[pattern.MixerSpec, ...]


def make_plan(config, teacher: stack.Stack) -> StagePlan:
    """Returns the plan of `config.linearize`: stages in order, and the student's mixers in each.

    Raises ValueError for layers that do not exist, or that a stage leaves out after an earlier one
    has converted them.
    """
    fields = config.linearize
    # Stages run in the order of their names, stage_2 before stage_10.
    layers = students.choose_layers(teacher.mixers, fields.layers, fields.keep_every, fields.keep)
    names = tuple(sorted(fields.stages, key=lambda name: (len(name), name)))
    converted = students.student_specs(teacher, fields.student, layers)
    specs, up_to_here = [], ()
    for name in names:
        before, up_to_here = up_to_here, layers
        if subset := fields.stages[name].layers:
            up_to_here = students.choose_layers(teacher.mixers, subset)
            if wrong := sorted(set(up_to_here) - set(layers)):
                raise ValueError(
                    f"linearize.stages.{name}.layers has {wrong}, which linearize.layers does not convert: {list(layers)}"
                )
        if wrong := sorted(set(before) - set(up_to_here)):
            raise ValueError(
                f"linearize.stages.{name}.layers lacks {wrong}, which an earlier stage converts: name all that are converted by then"
            )
        pairs = enumerate(zip(teacher.mixers, converted))
        specs.append(tuple(new if i in up_to_here else old for i, (old, new) in pairs))
    return StagePlan(names, tuple(specs), converted)


def check_stages(config, plan: StagePlan, teacher: Pretrained) -> None:
    """Traces the loss of every stage, so that mistakes in the last show before the first is run.

    Raises ValueError for patterns of parameters that match nothing, losses that no layer has, and
    other misfits.
    """

    def abstract(model):
        return tasks.Model(model, nn.unbox(batches.boxed_params(model)))

    length = teachers.row_length(config)
    batch = jax.eval_shape(lambda: batches.example(teacher.model, length))

    _model(teacher, plan.converted)  # raises for wrong options of its mixers
    own = abstract(teacher.model)
    if rule := config.linearize.inherit:
        first = _model(teacher, next(iter(plan.specs), plan.converted))
        jax.eval_shape(
            lambda params: (
                students.inherited_params(
                    jax.random.key(0), teacher.model, params, first, rule
                ).params
            ),
            own.params,
        )
    for name, specs in zip(plan.stages, plan.specs):
        try:
            student = abstract(_model(teacher, specs))
            task = tasks.make_task(config.linearize.stages[name], own, student)
            jax.eval_shape(task.loss, nn.unbox(task.boxed_params), task.frozen, batch)
        except ValueError as error:
            raise ValueError(f"linearize.stages.{name}: {error}") from error


def stage_config(config, name: str, model_config: dict[str, Any], last: bool) -> ConfigDict:
    """Returns the config of a stage's run; only the `last` stage may end with a text sample."""
    stage = config.linearize.stages[name]
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(model_config)
    config.train.steps = stage.steps
    config.optimizer.update({k: stage[k] for k in ("learning_rate", "weight_decay", "clip")})
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, max(1, stage.steps // 2))
    if not last:
        config.sample.length = 0
    return config


def linearize(config, workdir: str | Path, devices=None) -> dict:
    """Runs all stages of a linearization; returns the result that workdir/result.json also holds.

    workdir/student is the student's run folder, for `experiments.evaluate` and
    `experiments.generate`. Every stage has a folder of its own; finished stages are not run again,
    and an interrupted one resumes from its last checkpoint. Checkpoints hold what a stage trains;
    all other parameters come from the teacher and earlier stages.

    Raises ValueError for a config that does not fit the teacher, and the errors of `loop.train`.
    """
    workdir = Path(workdir)
    if (workdir / "config.json").exists() and not run_record.holds_linearization(workdir):
        raise ValueError(
            f"{workdir} holds a training run; give the linearization a folder of its own"
        )
    teacher = teachers.load(config.linearize.teacher, teachers.overrides(config))
    config = teachers.with_data(config, teacher)
    teachers.check_context(teacher.model_config, teachers.row_length(config))
    if config.linearize.export and not isinstance(teacher.model, language_model.LanguageModel):
        raise ValueError("linearize.export is True, and only language models have files of weights")
    plan = make_plan(config, teacher.model)
    check_stages(config, plan, teacher)
    workdir.mkdir(parents=True, exist_ok=True)
    for change in run_record.save_config(workdir, config):
        print(f"changed since this was started, for stages that are not done: {change}")

    own = tasks.Model(teacher.model, teacher.params)
    student, results = own, {}

    def grow(specs, number):
        """Returns the student with the mixers `specs`: new ones are seeded, others unchanged."""
        if specs == student.model.mixers:
            return student
        model = _model(teacher, specs)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        seed, rule = config.linearize.seed, config.linearize.inherit
        if rule and student is own:
            found = students.inherited_params(key, *student, model, rule)
            print(found.report())
            return tasks.Model(model, found.params)
        return tasks.Model(model, students.seed_params(key, *student, model, seed))

    # Each stage converts its layers and trains; what is done in the workdir is read.
    for number, (name, specs) in enumerate(zip(plan.stages, plan.specs)):
        student = grow(specs, number)
        model_config = students.student_config(teacher.model_config, specs)
        run_config = stage_config(config, name, model_config, last=name == plan.stages[-1])
        student, results[name] = _run_stage(run_config, name, own, student, workdir, devices)
    # Convert layers that no stage trained, and let selective layers choose.
    student = grow(plan.converted, len(plan.stages))
    chosen, mix = student, {}
    if any(spec.name == "selective" for spec in student.model.mixers):
        chosen, mix = _chosen(teacher, student)
    chosen_config = students.student_config(teacher.model_config, chosen.model.mixers)
    _save_student(config, chosen_config, chosen.params, workdir / "student")
    if config.linearize.export:
        found = loading.find(str(workdir / "student"))
        pretrained.write(found, own_layout.MODEL_TYPE, workdir / "pretrained")
    result = {
        "student": str(workdir / "student"),
        "pattern": chosen_config["pattern"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(chosen.params)),
        "stages": results,
        "trained_parameters": max((r["parameters"] for r in results.values()), default=0),
        "tokens": sum(r["trained_tokens"] for r in results.values()),
    }
    if mix:
        result["mix"] = {str(i): r for i, r in mix.items()}
    run_record.write_json(workdir / "result.json", result)
    return result


def _model(teacher: Pretrained, specs) -> stack.Stack:
    return models.from_config(students.student_config(teacher.model_config, specs))


def _run_stage(config, name, teacher, student, workdir, devices):
    """Returns the student after a stage, and the stage's result, from `workdir` if it is done."""
    stage, folder = config.linearize.stages[name], workdir / name
    done = folder / "result.json"
    task = tasks.make_task(stage, teacher, student)
    if done.exists():
        result = json.loads(done.read_text())
    else:
        result = loop.train(config, folder, devices, lambda *_: task)
    seq_len = teachers.row_length(config)
    result["trained_tokens"] = result["steps"] * config.data.batch_size * seq_len
    config = loop.resolve(config, make_dataset(config.data, "validation"))
    program = steps.build(config, seq_len, devices, task)
    _, trained = restore.evaluation_params(program, config, folder)
    return tasks.Model(student.model, program.model_params(trained)), result


def _chosen(teacher, student):
    found = students.chosen(*student)
    model = _model(teacher, found.specs)
    return tasks.Model(model, layer_trees.join(model, found.shared, found.layers)), found.mix


def _save_student(config, model_config, params, folder: Path) -> None:
    """Writes a student's parameters as a run's folder, with a checkpoint of step 0.

    A student written there before is replaced, unless it was trained further since.
    """
    earlier = Checkpoints(folder, keep=1, training=False)
    trained_further = bool(earlier.latest_step())
    earlier.close()
    if trained_further:
        print(f"{folder} was trained further since it was made: it stays as it is")
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(model_config)
    config.optimizer.name = "adamw"  # there is no optimizer's state to evaluate with
    run_record.save_config(folder, config)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    checkpoints = Checkpoints(folder, keep=1)
    state = TrainState(np.zeros((), np.int32), params, ())
    checkpoints.save(state, pretrained.NothingRead())
    checkpoints.close()
