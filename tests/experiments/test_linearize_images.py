"""Linearizations of encoders and denoisers by config: every method's stages fit, run and resume."""

import json

import jax
import numpy as np
import pytest

from configs import digits, digits_denoise
from configs.linearize import linfusion, lit, lolcats, shallow_ffn
from experiments.linearization import run, teachers
from experiments.training import loop, restore, run_record, steps
from seqmodels.checkpoints_io import Pretrained
from seqmodels.linearize import inherit
from tests.experiments.killing import killed

SMALL = {"d_model": 16, "d_ff": 16, "num_layers": 2, "pattern": "full_attention(num_heads=2)"}


def tiny(config, **model):
    config.data.update({"batch_size": 8, "eval_batch_size": 8})
    config.model.update(SMALL | model)
    config.train.update({"steps": 2, "eval_batches": 1, "test_batches": 1, "log_every": 1})
    config.checkpoint.every, config.schedule.warmup_steps = 2, 1
    config.mesh.data = 1
    return config


def trained(config, folder):
    loop.train(config, folder, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    config = tiny(digits_denoise.get_config(), objective="noise", learn_variance=True)
    return trained(config, tmp_path_factory.mktemp("denoiser"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return trained(tiny(digits.get_config()), tmp_path_factory.mktemp("encoder"))


def student_config(teacher, module, argument=""):
    config = module.get_config(",".join(filter(None, [argument, "tiny"])))
    config.linearize.teacher = str(teacher)
    config.data.update({"batch_size": 8, "eval_batch_size": 8})
    config.train.update({"eval_batches": 1, "test_batches": 1})
    config.mesh.data = 1
    return config


def student_of(folder):
    config = run_record.load_config(folder)
    program = steps.build(config, teachers.row_length(config), jax.devices()[:1])
    return program.model, restore.evaluation_params(program, config, folder)[1]


LIT = ["noise", "variance", "no_distillation", "scratch", "q", "k", "v", "kv", "qkv", "qkvo"]
LEVELS = {"": "mixer", "alrr": "residual", "elr": "block", "heads,m": "mixer"}
DEVICE = jax.devices()[:1]
METHODS = [
    *((lit, argument, "denoiser") for argument in ["", *LIT]),
    (linfusion, "", "denoiser"),
    *((shallow_ffn, argument, "encoder") for argument in LEVELS),
]


def label(case):
    return f"{case[0].__name__.split('.')[-1]}:{case[1]}"


FAST = ["lit:", "linfusion:", "shallow_ffn:elr"]
ALL = [pytest.mark.slow, pytest.mark.exhaustive]
MARKED = [pytest.param(case, marks=[] if label(case) in FAST else ALL) for case in METHODS]


@pytest.mark.parametrize("case", MARKED, ids=label)
def test_every_stage_fits_the_teacher(case):
    """Traced, not compiled: patterns match, and losses and metrics are (B, T)."""
    module, argument, kind = case
    of_noise = {"objective": "noise", "learn_variance": True}
    base = (digits_denoise if kind == "denoiser" else digits).get_config()
    teacher_config = tiny(base, **(of_noise if kind == "denoiser" else {}))
    sizes = {"num_classes": 10, "input_dim": 4, "grid": (4, 4)}
    teacher = Pretrained(teacher_config.model.to_dict() | sizes, {}, {}, "somewhere")
    config = student_config("somewhere", module, argument)
    plan = run.make_plan(config, teacher.model)
    run.check_stages(config, plan, teacher)
    assert {spec.name for spec in plan.converted} == {module.__name__.split(".")[-1]}


def run_twice(config, folder, monkeypatch):
    """Runs a linearization whole, and another that is killed at its stage's fourth step and then
    goes on from its second; returns the two workdirs."""
    run.linearize(config, folder / "whole", DEVICE)
    with killed(monkeypatch, lambda config, task, step: step == 3):
        run.linearize(config, folder / "stopped", DEVICE)
    run.linearize(config, folder / "stopped", DEVICE)
    starts = json.loads((folder / "stopped/stage_1/run.json").read_text())
    assert [start["step"] for start in starts] == [0, 2]
    return folder / "whole", folder / "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("case", MARKED, ids=label)
def test_methods_run_and_resume(case, request, tmp_path, monkeypatch):
    module, argument, kind = case
    config = student_config(request.getfixturevalue(kind), module, argument)
    whole, stopped = run_twice(config, tmp_path, monkeypatch)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(student_of(workdir / "student")[1] for workdir in (whole, stopped)),
    )


@pytest.mark.slow
def test_inherited_and_distilled(denoiser, tmp_path):
    """LiT: the student is a run like any other; it began as the teacher, but for attention."""
    config = student_config(denoiser, lit)
    result = run.linearize(config, tmp_path / "whole", DEVICE)
    model, params = student_of(tmp_path / "whole/student")
    assert [spec.name for spec in model.mixers] == ["lit", "lit"]
    assert result["tokens"] == 4 * 8 * 16
    rows = (tmp_path / "whole/stage_1/metrics.jsonl").read_text().splitlines()
    assert {"noise_distance", "variance_distance", "bound"} <= json.loads(rows[0]).keys()

    del config.linearize.stages.stage_1
    run.linearize(config, tmp_path / "none", DEVICE)
    own = inherit.paths(*student_of(tmp_path / "none/student"))
    for path, leaf in inherit.paths(*student_of(denoiser)).items():
        if "/mixer/" not in path:
            np.testing.assert_array_equal(own[path], leaf)
    moved = inherit.paths(model, params)
    assert all(not np.array_equal(moved[p], own[p]) for p in own if p.endswith("mixer/v/kernel"))


@pytest.mark.slow
def test_what_does_not_fit(denoiser, encoder, tmp_path):
    def check(message, teacher, module, argument="", **changes):
        config = student_config(teacher, module, argument)
        config.linearize.update(changes)
        with pytest.raises(ValueError, match=message):
            run.linearize(config, tmp_path / "never", DEVICE)
        assert not (tmp_path / "never").exists()

    check("noise is 0.5, and a distillation of this kind of model has the losses ce, kl", encoder,
          lit)  # fmt: skip
    check("only language models have files of weights", denoiser, lit, export=True)
    check("attention' matches no parameter of the teacher", denoiser, lit, inherit="^attention")
    check(r"of architecture 'denoiser' and data.name is 'python_stdlib', text", denoiser, lolcats)
    config = student_config(encoder, shallow_ffn)
    config.data.patch = 1
    with pytest.raises(ValueError, match="model.input_dim is 4, but the dataset's is 1"):
        run.linearize(config, tmp_path / "never", DEVICE)
