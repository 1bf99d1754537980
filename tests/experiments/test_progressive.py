"""An ensemble that grows by students: each run's scores are the sum's, and an interrupted
progression resumes to the same students."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from configs import progressive as config_of
from experiments.data import make_dataset
from experiments.linearization import progressive, tasks, teachers
from experiments.training import loop, restore, run_record, steps
from tests.experiments.killing import killed

pytestmark = pytest.mark.slow
DEVICE = jax.devices()[:1]
TINY = {"d_model": 8, "d_ff": 8, "num_layers": 1, "pattern": "full_attention(num_heads=1)"}


def small(config):
    config.model.update(TINY)
    config.data.update({"batch_size": 8, "eval_batch_size": 8})
    config.train.update({"steps": 2, "eval_batches": 1, "test_batches": 2})
    config.checkpoint.every, config.schedule.warmup_steps = 2, 1
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    loop.train(small(digits.get_config("attention")), folder, DEVICE)
    return folder


def make_config(teacher):
    config = config_of.get_config("linear_attention,tiny")
    config.progressive.teacher = str(teacher)
    for width, name in zip((4, 8), sorted(config.progressive.members)):
        config.progressive.members[name] = TINY | {"d_model": width}
    config.mesh.data, config.train.test_batches = 1, 2
    return config


def student(folder):
    config = run_record.load_config(folder)
    program = steps.build(config, teachers.row_length(config), DEVICE)
    return tasks.Model(program.model, restore.evaluation_params(program, config, folder)[1])


def test_scores_are_those_of_the_sum_and_a_stopped_progression_resumes(
    teacher, tmp_path, monkeypatch
):
    config = make_config(teacher)
    result = progressive.progress(config, tmp_path / "whole", DEVICE)
    members = [student(tmp_path / f"whole/member_{i}") for i in (1, 2)]
    assert [m.model.d_model for m in members] == [4, 8]

    # The second run's accuracy and loss, from both students' logits on the same images.
    right, nll, count = 0.0, 0.0, 0.0
    batches = iter(make_dataset(config.data, "test"))
    for batch in (next(batches), next(batches)):
        total_BTW = sum(
            tasks.logits(m, {k: jnp.asarray(x) for k, x in batch.items()}) for m in members
        )
        counts = batch["loss_mask"] > 0
        labels_N, logits_NW = batch["labels"][counts], np.asarray(total_BTW)[counts]
        right += np.sum(logits_NW.argmax(-1) == labels_N)
        log_p_NW = jax.nn.log_softmax(logits_NW, axis=-1)
        nll -= float(np.sum(np.take_along_axis(np.asarray(log_p_NW), labels_N[:, None], -1)))
        count += counts.sum()
    found = result["members"]["member_2"]
    np.testing.assert_allclose(
        [found["accuracy"], found["loss"]], [right / count, nll / count], rtol=1e-5
    )
    assert set(result["teacher"]) == set(found)
    lines = progressive.text(result).splitlines()
    assert [line.split()[0] for line in lines] == ["member_1", "member_2", "teacher"]

    with killed(monkeypatch, lambda config, _, step: config.model.d_model == 8 and step == 3):
        progressive.progress(config, tmp_path / "stopped", DEVICE)
    assert progressive.progress(config, tmp_path / "stopped", DEVICE) == result
    again = student(tmp_path / "stopped/member_2")
    jax.tree.map(np.testing.assert_array_equal, again.params, members[1].params)
    with pytest.raises(ValueError, match="holds a linearization; its student is a run"):
        run_record.load_config(tmp_path / "whole")


def test_what_does_not_fit(teacher, tmp_path):
    def check(message, change):
        config = make_config(teacher)
        change(config)
        with pytest.raises(ValueError, match=message):
            progressive.progress(config, tmp_path / "never", DEVICE)
        assert not (tmp_path / "never").exists()

    def member(**fields):
        return lambda config: config.progressive.members.member_2.update(fields)

    check("no teacher: set", lambda config: config.progressive.update({"teacher": ""}))
    check(
        "progressive.members.member_2 has 'width', and config.model architecture", member(width=8)
    )
    check("progressive.members.member_2: .*statistics", member(norm="prepbn(steps=4)"))

    def denoise(config):
        config.model.architecture, config.data.task = "denoiser", "denoising"

    check("member_1: the student predicts no classes and the teacher 10", denoise)
