"""Linearizations of a tiny teacher by config: every method's stages fit, a run resumes to the same
student, mistakes are told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import seqmodels
from configs.linearize import (
    common,
    gated_delta_net,
    hedgehog,
    lawcat,
    liger,
    lolcats,
    mmmamba,
    selective,
    window,
)
from experiments.data import default_config
from experiments.inference import pretrained
from experiments.linearization import comparison, decoding, run, tasks, teachers
from experiments.training import loop, restore, run_record, steps
from experiments.training.checkpoints import Checkpoints, TrainState
from seqmodels import language_model
from seqmodels.checkpoints_io import Pretrained
from seqmodels.linearize import lora, partition, students
from tests.experiments import tiny
from tests.experiments.killing import killed

TEACHER = {
    "pattern": "attention(num_heads=4, num_kv_heads=2, max_length=64)",
    "num_layers": 4,
    "d_model": 16,
    "d_ff": 16,
    "vocab_size": 257,
}
FAST = ["liger:gla", "lolcats:"]
EXHAUSTIVE = [
    "liger:scalar",
    "lolcats:no_transfer",
    "hedgehog:elu_plus_one",
    "mmmamba:scratch",
    "mmmamba:mamba_in_llama",
    "gated_delta_net:all",
]
METHODS = [
    *((liger, v) for v in ("gla", "hgrn2,hybrid", "scalar")),
    *((lolcats, v) for v in ("", "no_transfer")),
    *((hedgehog, v) for v in ("", "t2r", "elu_plus_one")),
    *((mmmamba, v) for v in ("hybrid", "scratch", "mamba_in_llama")),
    *((gated_delta_net, v) for v in ("", "all")),
    *((module, "") for module in (lawcat, selective, window)),
]


def label(case):
    return f"{case[0].__name__.split('.')[-1]}:{case[1]}"


def marks(case):
    if label(case) in EXHAUSTIVE:
        return [pytest.mark.exhaustive]
    return [] if label(case) in FAST else [pytest.mark.slow]


@pytest.mark.parametrize("case", [pytest.param(c, marks=marks(c)) for c in METHODS], ids=label)
def test_every_stage_fits_the_teacher(case):
    """Traced, not compiled: patterns match, losses and their gradients have the shapes of what is
    trained."""
    module, argument = case
    config = module.get_config(",".join(filter(None, [argument, "tiny"])))
    model = language_model.from_config(TEACHER)
    plan = run.make_plan(config, model)
    batch = {
        name: jax.ShapeDtypeStruct((4, 64), dtype)
        for name, dtype in (
            ("inputs", jnp.int32),
            ("labels", jnp.int32),
            ("segment_ids", jnp.int32),
        )
    }

    def abstract(model):
        tokens_BT = jnp.zeros((1, 2), jnp.int32)
        return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"])

    teacher = tasks.Model(model, abstract(model))
    for name, specs in zip(plan.stages, plan.specs, strict=True):
        new = language_model.from_config(students.student_config(TEACHER, specs))
        stage = config.linearize.stages[name]
        task = tasks.make_task(stage, teacher, tasks.Model(new, abstract(new)))
        params = nn.unbox(task.boxed_params)
        trained = partition.flatten(params)
        assert trained and bool(stage.lora) == any(path.startswith("lora/") for path in trained)
        frozen = task.frozen["pairs" if stage.objective == "transfer" else "student"]
        assert not set(partition.flatten(params.get("trained", {}))) & set(
            partition.flatten(frozen)
        )

        def loss(params, frozen, batch, task=task):
            loss_BT, metrics = task.loss(params, frozen, batch)
            return jnp.sum(loss_BT), metrics

        grads, metrics = jax.eval_shape(jax.grad(loss, has_aux=True), params, task.frozen, batch)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        assert all(x.shape == (4, 64) for x in metrics.values()) and "loss" in metrics


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny.make_config(
        folder, pattern="attention(num_heads=2, num_kv_heads=1, max_length=32)", num_layers=2
    )
    config.train.steps, config.checkpoint.every = 3, 3
    loop.train(config, folder / "run", jax.devices()[:1])
    return folder / "run", config


def make_config(teacher_run, module=lolcats, argument="tiny"):
    """The method's config on the teacher's data: attention transfer, then LoRA."""
    folder, teacher = teacher_run
    config = module.get_config(argument)
    config.linearize.teacher = str(folder)
    config.linearize.student = "lolcats(window=4)"
    config.data = teacher.data.copy_and_resolve_references()
    config.mesh.data = 1
    config.sample.length = 0
    config.checkpoint.every = 2
    return config


@pytest.fixture(scope="module")
def whole(teacher_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    config = make_config(teacher_run)
    config.linearize.export = True
    return workdir, run.linearize(config, workdir, jax.devices()[:1])


def student_of(folder):
    config = run_record.load_config(folder)
    program = steps.build(config, config.data.seq_len, jax.devices()[:1])
    return program.model, restore.evaluation_params(program, config, folder)[1]


@pytest.mark.slow
def test_the_student_is_a_run_that_others_can_load(whole, teacher_run):
    workdir, result = whole
    assert json.loads((workdir / "result.json").read_text()) == result
    model, params = student_of(workdir / "student")
    assert [spec.name for spec in model.mixers] == ["lolcats", "lolcats"]
    _, theirs = student_of(teacher_run[0])
    own, theirs = partition.flatten(params), partition.flatten(theirs)
    adapted = {p for p in theirs if not np.array_equal(own[p], theirs[p])}
    assert adapted == {p for p in theirs if "/mixer/" in p and p.endswith("kernel")}
    assert result["stages"]["stage_1"]["loss"] > 0
    exported = seqmodels.load(str(workdir / "pretrained"))
    assert exported.tokenizer_name == "bytes" and exported.document_token == ""
    jax.tree.map(np.testing.assert_array_equal, exported.params, params)


@pytest.mark.slow
def test_a_student_that_was_trained_on_takes_the_earlier_ones_place(teacher_run, whole, tmp_path):
    config = make_config(teacher_run)
    model, params = student_of(whole[0] / "student")
    model_config = run_record.load_config(whole[0] / "student").model.to_dict()
    for _ in range(2):
        params = jax.tree.map(lambda x: x + 1.0, params)
        run._save_student(config, model_config, params, tmp_path / "student")
    found, saved = student_of(tmp_path / "student")
    assert found.mixers == model.mixers
    jax.tree.map(np.testing.assert_array_equal, saved, params)
    checkpoints = Checkpoints(tmp_path / "student", keep=1)
    checkpoints.save(TrainState(np.array(3, np.int32), params, ()), pretrained.NothingRead())
    checkpoints.close()
    fewer = jax.tree.map(lambda x: x - 1.0, params)
    run._save_student(config, model_config, fewer, tmp_path / "student")
    jax.tree.map(np.testing.assert_array_equal, student_of(tmp_path / "student")[1], params)


@pytest.mark.slow
def test_checkpoints_hold_what_is_trained_alone(whole):
    workdir, result = whole
    found = {}
    for name in ("stage_1", "stage_2"):
        checkpoints = Checkpoints(workdir / name, training=False)
        metadata = checkpoints._checkpointer.checkpointables_metadata(4).metadata
        found[name] = set(partition.flatten(metadata["params"]))
        sizes = [np.prod(x.shape) for x in jax.tree.leaves(metadata["params"])]
        assert sum(sizes) == result["stages"][name]["parameters"]
        moments = jax.tree.leaves(metadata["training"]["opt_state"])
        assert sum(np.prod(x.shape) for x in moments) <= 2 * sum(sizes) + 2
    assert {path.split("/")[-2] for path in found["stage_1"]} == {"q_map", "k_map", "mixer"}
    assert all(path.split("/")[-1] in (lora.A, lora.B) for path in found["stage_2"])


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_student(teacher_run, whole, tmp_path, monkeypatch):
    config = make_config(teacher_run)

    def in_stage_2(_, task, step):
        return any("lora" in path for path in task.boxed_params) and step == 3

    with killed(monkeypatch, in_stage_2):
        run.linearize(config, tmp_path, jax.devices()[:1])
    assert (tmp_path / "stage_2" / "checkpoints" / "2").is_dir()
    run.linearize(config, tmp_path, jax.devices()[:1])
    starts = json.loads((tmp_path / "stage_2" / "run.json").read_text())
    assert [start["step"] for start in starts] == [0, 2]
    jax.tree.map(
        np.testing.assert_array_equal,
        student_of(tmp_path / "student")[1],
        student_of(whole[0] / "student")[1],
    )


@pytest.mark.slow
def test_progressive_replacement(teacher_run):
    config = make_config(teacher_run)
    config.linearize.stages.stage_1.layers = "1"
    plan = run.make_plan(config, teachers.load(config.linearize.teacher, {}).model)
    names = [[spec.name for spec in specs] for specs in plan.specs]
    assert names == [["attention", "lolcats"], ["lolcats", "lolcats"]]
    config.linearize.layers = "0"
    with pytest.raises(ValueError, match=r"stage_1.layers has \[1\], which linearize.layers does"):
        run.make_plan(config, teachers.load(config.linearize.teacher, {}).model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": "0-7"}, r"layers \[2, 3, 4, 5, 6, 7\] are not there: the teacher has 2"),
        ({"teacher": ""}, "no teacher: set --config.linearize.teacher"),
        ({"student": "lolcat"}, "unknown mixer 'lolcat'; choose one of .*lolcats"),
    ],
)
def test_what_does_not_fit_the_teacher(teacher_run, tmp_path, change, message):
    config = make_config(teacher_run)
    config.linearize.update(change)
    with pytest.raises(ValueError, match=message):
        run.linearize(config, tmp_path / "none", jax.devices()[:1])


@pytest.mark.slow
def test_a_context_longer_than_the_teachers(teacher_run, tmp_path):
    config = make_config(teacher_run)
    config.data.seq_len = 64
    with pytest.raises(
        ValueError, match="data.seq_len is 64, longer than the teacher's context of 32"
    ):
        run.linearize(config, tmp_path, jax.devices()[:1])


def abstract_teacher(**fields):
    kept = {"tokenizer": "bytes", "document_token": ""}
    model_config = TEACHER | fields
    return Pretrained(model_config, {}, kept, "somewhere")


@pytest.mark.parametrize(
    "module, stage, change, message",
    [
        (lolcats, "stage_2", {"lora": "mixer/z"}, "lora: pattern 'mixer/z' matches no parameter"),
        (lawcat, "stage_1", {"attention_map": 1.0}, "no converted layer gives 'attention_map'"),
        (selective, "stage_2", {"select_target": 9}, "select_target is 9, and the student has 4"),
        (lolcats, "stage_1", {"heads": 0.0}, "no loss: a 'transfer' needs a weight for one of hea"),
        (window, "stage_1", {"ce": 0.0}, "no loss: a 'distill' needs a weight for one of ce, kl"),
    ],
)
def test_mistakes_in_a_stage_are_told_before_the_first_runs(module, stage, change, message):
    config, teacher = module.get_config("tiny"), abstract_teacher()
    config.linearize.stages[stage].update(change)
    plan = run.make_plan(config, teacher.model)
    with pytest.raises(ValueError, match=f"linearize.stages.{stage}: .*{message}"):
        run.check_stages(config, plan, teacher)


def test_a_runs_folder_and_a_linearizations_are_not_taken_for_each_other(tmp_path):
    """The teacher's own folder given as --workdir once lost its config."""
    taken, config = tmp_path / "run", lolcats.get_config("tiny")
    taken.mkdir()
    run_record.save_config(taken, tiny.make_config(tmp_path))
    before = (taken / "config.json").read_text()
    with pytest.raises(ValueError, match="run holds a training run; give the linearization a fol"):
        run.linearize(config, taken)
    assert (taken / "config.json").read_text() == before
    run_record.save_config(tmp_path, config)
    assert run_record.holds_linearization(tmp_path)
    with pytest.raises(ValueError, match="its student is a run: .*/student"):
        run_record.load_config(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # as a stage and the student have them
    assert run_record.load_config(tmp_path).linearize.student == config.linearize.student


def test_a_comparison_tells_which_method_does_not_fit_before_it_begins(tmp_path, monkeypatch):
    teacher = abstract_teacher(pattern="gla(num_heads=2)")
    monkeypatch.setattr(teachers, "load", lambda *arguments: teacher)
    with pytest.raises(ValueError, match="liger: no layer to convert"):
        comparison.compare("somewhere", ["liger"], tmp_path, argument="tiny")
    assert not list(tmp_path.iterdir())


def test_stages_convert_more_and_more_layers():
    config, model = lolcats.get_config("tiny"), language_model.from_config(TEACHER)
    config.linearize.stages.stage_1.layers = "0-1"
    config.linearize.stages.stage_2.layers = "1-3"
    with pytest.raises(
        ValueError, match=r"stage_2.layers lacks \[0\], which an earlier stage conv"
    ):
        run.make_plan(config, model)


def test_the_tokens_are_the_teachers():
    config = lolcats.get_config("tiny")
    found = teachers.with_data(config, abstract_teacher())
    assert found.data.tokenizer == "bytes" and found.data.document_token == ""
    config.data.tokenizer = "bytes"
    with pytest.raises(ValueError, match="the tokenizer bytes has 257 ids and the model somewhere"):
        teachers.with_data(config, abstract_teacher(vocab_size=4096))
    config.data.tokenizer = "teacher"
    untold = abstract_teacher()
    untold.hf_config.clear()
    with pytest.raises(ValueError, match="the teacher brings no tokenizer: set --config.data.tok"):
        teachers.with_data(config, untold)
    config.data = default_config("mqar")
    with pytest.raises(ValueError, match="reads text; data.name is 'mqar'"):
        teachers.with_data(config, abstract_teacher())
    with pytest.raises(ValueError, match="longer than the teacher's context of 32 tokens"):
        teachers.check_context(TEACHER | {"learned_positions": 32}, 64)


def test_stages_that_train_nothing():
    model = tasks.Model(language_model.from_config(TEACHER), {})
    stage = window.get_config().linearize.stages.stage_1
    stage.lora = ""
    with pytest.raises(ValueError, match="the stage trains nothing"):
        tasks.make_task(stage, model, model)
    stage.objective = "imitate"
    with pytest.raises(ValueError, match="unknown objective 'imitate'; choose one of transfer, d"):
        tasks.make_task(stage, model, model)
    with pytest.raises(ValueError, match="unknown config argument 'huge'; choose one of .*smollm"):
        common.with_argument(window.get_config(), "huge")


def test_a_students_state_does_not_grow():
    config = TEACHER | {"pattern": "lolcats(num_heads=4, window=8)"}
    assert decoding.state_bytes(config, 1024) == decoding.state_bytes(config, 32768)
    cache = 2 * 4 * 2 * 4 * 4  # k and v of 4 layers, 2 heads of 4 channels, float32
    grown = decoding.state_bytes(TEACHER, 2048) - decoding.state_bytes(TEACHER, 1024)
    assert grown == 1024 * (cache + 4 * 4)  # and a slot's position
