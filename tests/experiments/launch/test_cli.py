import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from ml_collections import ConfigDict

from experiments.launch import cli
from experiments.training import run_record
from seqmodels.language_model import config_fields
from tests.experiments import called, tiny

ROOT = Path(__file__).parents[3]


def error_of(function, *arguments) -> str:
    with pytest.raises(cli.UserError) as error:
        function(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimzer.learning_rate=1", "config has no 'optimzer'; did you mean config.optimizer or"),
        ("optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
        ("learning_rate=1", "did you mean config.optimizer.learning_rate?"),
        ("parallel.exchange=ring", "did you mean config.parallel.collective?"),
        (
            "schedule.wormup=1",
            "config.schedule has no 'wormup'; it has decay_fraction, final_fraction",
        ),
        ("seed.x=1", "config.seed is a value, not a section"),
    ],
)
def test_a_typo_is_named_with_its_path_and_close_matches(tmp_path, override, message):
    config = tiny.make_config(tmp_path)
    said = error_of(cli.check_overrides, config, ["train", f"--config.{override}"])
    assert f"unknown config field config.{override.split('=')[0]}" in said and message in said


def test_overrides_of_what_there_is_pass(tmp_path):
    config = tiny.make_config(tmp_path)
    arguments = ["--config.train.steps=3", "-config.seed", "4", "--noconfig.tensorboard", "--x.y=2"]
    cli.check_overrides(config, ["train", *arguments])


def overridden(*overrides, config="quickstart.py"):
    return called.read(config, *overrides)


def test_every_field_is_set_by_a_flag_of_its_type():
    """Sets every scalar by the text of its own value, and optional ones by None too."""
    config = overridden()
    values = {
        f"{section}.{name}": value
        for section, fields in config.items()
        if isinstance(fields, ConfigDict)
        for name, value in fields.items()
    }
    optional = [
        f"model.{n}" for n, (kind, _) in config_fields().items() if type(None) in get_args(kind)
    ]
    flags = [f"--config.{path}={value}" for path, value in values.items() if value is not None]
    assert overridden(*flags).to_dict() == config.to_dict()
    without = overridden(*(f"--config.{path}=None" for path in optional))
    assert optional and all(without.model[path.split(".")[1]] is None for path in optional)
    given = {"model.d_ff": 24, "model.logit_softcap": 30.0, "model.learned_positions": 9}
    given |= {"model.channel_mixer": "moe(num_experts=4)", "model.mixer_residual": (1.0, 0.5)}
    given |= {"model.dtype": "bfloat16", "model.tied_embeddings": False, "model.norm_eps": 1e-3}
    given |= {"model.grid": (4, 8)}
    changed = overridden(*(f"--config.{path}={value}" for path, value in given.items()))
    assert {path: changed.model[path.split(".")[1]] for path in given} == given
    assert not overridden("--noconfig.model.scan_layers").model.scan_layers
    assert overridden("--config.sample.prompt=None").sample.prompt == "None"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps=many", "config.train.steps=many: expected an integer$"),
        ("train.steps=2.5", "config.train.steps=2.5: expected an integer$"),
        ("optimizer.b1=None", "config.optimizer.b1=None: expected a number$"),
        ("model.d_ff=wide", "config.model.d_ff=wide: expected an integer or None$"),
        ("model.logit_softcap=yes", "config.model.logit_softcap=yes: expected a number or"),
        ("model.scan_layers=perhaps", "scan_layers=perhaps: expected true or false$"),
        ("model.grid=8", "config.model.grid=8: expected a tuple or None"),
        ("model.grid=(8", "config.model.grid=.8: expected a tuple or None"),
        ("model.num_layers=None", "config.model.num_layers=None: expected an integer$"),
        ("optimizer=adamw", "config.optimizer is a section; set its fields, .*learning_rate"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_sentence(override, message):
    with pytest.raises(cli.UserError, match=message):
        overridden(f"--config.{override}")


def test_a_run_of_an_older_version_is_read_with_defaults_and_types(tmp_path):
    """Fields that its config.json lacks, since they came later, are no change of the config."""
    config = overridden("--config.model.vocab_size=257")
    old = config.to_dict()
    old["model"] = {n: old["model"][n] for n in ("vocab_size", "d_model", "num_layers", "pattern")}
    old["model"]["channel_mixer"] = None
    del old["parallel"], old["train"]["z_loss"], old["data"]["prefetch"]
    run_record.write_json(tmp_path / "config.json", old)
    config.model.channel_mixer = None
    assert run_record.load_config(tmp_path).to_dict() == config.to_dict()
    again = overridden(
        "--config.model.d_ff=32",
        "--config.model.channel_mixer=gelu",
        config=f"workdir.py:{tmp_path}",
    )
    assert (again.model.d_ff, again.model.channel_mixer) == (32, "gelu")
    assert run_record.save_config(tmp_path, again) == [
        "config.model.channel_mixer: None -> 'gelu'",
        "config.model.d_ff: None -> 32",
    ]


def test_a_config_that_is_not_there_is_explained(tmp_path, monkeypatch):
    (tmp_path / "quick.py").write_text("def get_config(arg=''):\n    return arg\n")
    (tmp_path / "other.py").write_text("get_configs = 1\n")
    assert "give a config" in error_of(cli.load_config, "")
    assert "Did you mean" in error_of(cli.load_config, str(tmp_path / "quikc.py"))
    assert f"Did you mean {tmp_path}/quick.py?" in error_of(cli.load_config, f"{tmp_path}/quick")
    assert "quick.py" in error_of(cli.load_config, str(tmp_path))
    assert "is not a config" in error_of(cli.load_config, str(tmp_path / "other.py"))
    assert "returned str, not an ml" in error_of(cli.load_config, f"{tmp_path}/quick.py:x")
    monkeypatch.chdir(tmp_path)
    said = error_of(cli.load_config, "configs/common.py")
    assert f"looked from {tmp_path}" in said and f"cd {ROOT}" in said


def test_a_config_and_its_argument_are_read(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config(a='1'):\n    return ConfigDict({'a': a})\n"
    )
    assert cli.load_config(str(path)).a == "1"
    assert cli.load_config(f"{path}:x:y").a == "x:y"


def test_our_value_errors_are_the_users_and_those_of_libraries_are_not():
    def ours(argv):
        raise ValueError("choose one of a, b")

    def a_library(argv):
        ConfigDict({"a": 1}).update_from_flattened_dict({"b.c": 1})
        int("three")

    assert error_of(cli._explained, ours, []) == "choose one of a, b"
    with pytest.raises(Exception) as error:
        cli._explained(a_library, [])
    assert not isinstance(error.value, cli.UserError)


def test_the_saved_config_comes_back(tmp_path):
    config = tiny.make_config(tmp_path)
    assert run_record.save_config(tmp_path, config) == []
    assert run_record.load_config(tmp_path).to_dict() == config.to_dict()
    config.train.steps = 9
    assert run_record.save_config(tmp_path, config) == ["config.train.steps: 6 -> 9"]
    with pytest.raises(ValueError, match="holds no run"):
        run_record.load_config(tmp_path / "elsewhere")


def python(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


def closed_pipe():
    """Returns a pipe that fails to be written, as in `... | head` once head has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_a_reader_that_has_left_ends_the_program_quietly():
    program = (
        "from experiments.launch import cli\ncli.run(lambda argv: print('a'), config_from=None)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with closed_pipe() as output:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=buffered,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_so_does_one_that_leaves_while_it_prints(monkeypatch):
    with closed_pipe() as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError) as error:
            print("a", flush=True)
        assert cli._exit_code(error.value) == (141, "")
        print("what is left to write goes nowhere", flush=True)


def test_a_broken_pipe_elsewhere_keeps_its_traceback():
    assert cli._exit_code(BrokenPipeError(32, "Broken pipe")) == (1, None)


def test_an_interrupt_and_a_platform_that_is_not_there_are_told():
    assert cli._exit_code(KeyboardInterrupt()) == (130, "interrupted")
    platform = RuntimeError("Unable to initialize backend 'tpu': no device (set JAX_PLATFORMS='')")
    assert cli._exit_code(platform) == (2, str(platform))
    assert cli._exit_code(RuntimeError("in a kernel")) == (1, None)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "run").mkdir(parents=True)
    assert cli._exit_code(error.value) == (2, f"{tmp_path}/file/run: Not a directory")


@pytest.mark.slow
def test_help_needs_no_run_and_no_config():
    shown = python("experiments.generate", "--help")
    assert "--top_k: sample among" in shown.stdout and shown.stderr == ""


def test_a_typo_ends_the_program_with_code_2_and_no_traceback(tmp_path):
    config = "--config=configs/quickstart.py:smoke"
    done = python(
        "experiments.train", config, "--config.optimzer.clip=1", f"--workdir={tmp_path}/run"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown config field config.optimzer.clip")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_evaluate_and_generate_as_a_user_calls_them(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "config.py").write_text(
        "from pathlib import Path\nfrom tests.experiments import tiny\n"
        f"def get_config(arg=''):\n    return tiny.make_config(Path({str(tmp_path)!r}))\n"
    )
    train = ("experiments.train", f"--config={tmp_path / 'config.py'}", workdir)
    (tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    refused = python(*train, "--resume")
    assert refused.returncode == 2 and "holds no checkpoint" in refused.stderr
    trained = python(*train, "--config.train.steps=4")
    assert trained.returncode == 0, trained.stderr
    assert "gzip -9" in trained.stdout and f"{tmp_path}/run/loss.png" in trained.stdout
    assert "step 4/4: loss" in trained.stderr and "Traceback" not in trained.stderr
    wrong = python(*train, "--config.optimizer.name=adma", "--config.train.steps=5")
    assert wrong.returncode == 2 and "choose one of adamw" in wrong.stderr

    scored = python(
        "experiments.evaluate",
        workdir,
        "--split=validation",
        "--config.data.seq_len=48",
        "--context_lengths=16",
    )
    assert scored.returncode == 0, scored.stderr
    assert "bits per byte" in scored.stdout and "45-47" in scored.stdout
    assert "last quarter's loss\n            16 " in scored.stdout
    assert (tmp_path / "run" / "evaluation_validation.png").exists()
    searched = python(
        "experiments.evaluate",
        workdir,
        "--retrieval=passkey",
        "--lengths=300,400",
        "--depths=0,1",
        "--examples=2",
    )
    assert searched.returncode == 0, searched.stderr
    assert "depth   0.00   1.00" in searched.stdout
    rows = json.loads((tmp_path / "run" / "evaluation_retrieval.json").read_text())["rows"]
    assert [(row["length"], row["depth"]) for row in rows] == [
        (300, 0),
        (300, 1),
        (400, 0),
        (400, 1),
    ]
    missing = python("experiments.evaluate", workdir, "--retrieval=haystack")
    assert missing.returncode == 2 and "choose one of passkey, s_niah_1" in missing.stderr

    generate = ("experiments.generate", workdir, "--prompt=12 squared")
    generated = python(*generate, "--length=20", "--temperature=0")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("12 squared") and len(generated.stdout) > len("12 squared\n")
    assert python(*generate, "--length=20", "--temperature=0").stdout == generated.stdout
    bad = python(*generate, "--top_p=2")
    assert bad.returncode == 2 and "top_p is 2.0" in bad.stderr
