"""Scores a model: perplexity by position and by length of context, retrieval from long texts, tasks
of the evaluation harness.

    python -m experiments.evaluate --workdir=runs/quickstart-20261121-120000 --split=test
    python -m experiments.evaluate --workdir=... --config.data.seq_len=4096 --max_batches=20
    python -m experiments.evaluate --workdir=... --context_lengths=256,1024,4096
    python -m experiments.evaluate --workdir=... --retrieval=passkey,s_niah_2 --lengths=1024,8192
    python -m experiments.evaluate --workdir=... --lm_eval_tasks=arc_easy    # extra [eval]
    python -m experiments.evaluate --model=gguf:SmolLM2.gguf --data=text --config.data.paths=docs

What is scored is the latest checkpoint of a run (--workdir), or any source of pretrained weights
(--model), as `seqmodels.load` takes them. Without --retrieval (see experiments/data/needles.py) and
--lm_eval_tasks it is scored on a split of the run's data, or of --data; every option of the data
can be overridden, so a model can be scored on other lengths or other text. --context_lengths scores
the same text again in rows of each length: every target once, from at most so many tokens before
it. Beside the tables JSON and pictures are written, into the workdir or --out.
"""

import datetime
from functools import partial
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.data import needles
from experiments.inference import retrieval, split_scores, subjects
from experiments.launch import cli
from experiments.training import run_record
from seqmodels import loading

_INTEGER, _LIST = partial(flags.DEFINE_integer, lower_bound=1), flags.DEFINE_list
_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_MODEL = flags.DEFINE_string("model", None, "in place of a run: a folder, gguf:<file>, a hub name")
_DTYPE = flags.DEFINE_enum("dtype", None, loading.DTYPES, "with --model: of the weights")
_MAX_LEN = _INTEGER("max_len", None, "with --model: tokens that full-attention layers hold")
_TEXTS = ["python_stdlib", "text", "tfds"]
_DATA = flags.DEFINE_enum("data", _TEXTS[0], _TEXTS, "with --model: text to score it on")
_OUT = flags.DEFINE_string("out", None, "for results; default: the workdir, or a new one in runs")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "what to score")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_BATCHES = flags.DEFINE_integer("max_batches", 0, "how many to score; 0: all", lower_bound=0)
_BUCKETS = _INTEGER("buckets", 16, "rows of the table")
_CONTEXTS = _LIST("context_lengths", [], "lengths of rows to score again in")
_RETRIEVAL = _LIST("retrieval", [], f"some of {', '.join(needles.FORMS)}")
_LENGTHS = _LIST("lengths", list(map(str, retrieval.LENGTHS)), "of retrieval, in tokens")
_DEPTHS = _LIST("depths", list(map(str, retrieval.DEPTHS)), "of retrieval, 0 to 1")
_EXAMPLES = _INTEGER("examples", 10, "of retrieval, for each length and depth")
_BATCH_SIZE = _INTEGER("batch_size", 8, "prompts read and continued together")
_TASKS = _LIST("lm_eval_tasks", [], "tasks of the evaluation harness")
_TASKS_PATH = flags.DEFINE_string("lm_eval_path", None, "a folder with task files of your own")
_LIMIT = _INTEGER("lm_eval_limit", None, "examples of each task")
_FEWSHOT = flags.DEFINE_integer("lm_eval_fewshot", None, "solved examples shown before each")


def main(argv):
    cli.no_arguments(argv)
    contexts, lengths = (cli.numbers(f.name, f.value, least=2) for f in (_CONTEXTS, _LENGTHS))
    subject = _subject()
    for flag in (_RETRIEVAL, _TASKS, _CONTEXTS):
        if flag.value and subject.loaded is None:
            name = subject.config.data.name
            raise cli.UserError(f"the run's data, {name!r}, is not text: --{flag.name} needs text")
    for length in contexts:
        subject.program.model.check_length(length)
    new = f"runs/evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = Path(_OUT.value or _WORKDIR.value or new) if jax.process_index() == 0 else None
    if out:
        cli.output_folder(out)
        print(subject.name)
    if _RETRIEVAL.value:
        depths = cli.numbers("depths", _DEPTHS.value, float, least=0)
        options = {"examples": _EXAMPLES.value, "batch_size": _BATCH_SIZE.value}
        rows = retrieval.evaluate(
            subject.loaded, _RETRIEVAL.value, lengths, depths, seed=subject.config.seed, **options
        )
        _write(out, "retrieval", {"model": subject.name, "rows": rows}, retrieval.table(rows))
    if _TASKS.value:
        from experiments.inference import lm_eval_adapter  # an extra

        model = lm_eval_adapter.HarnessModel(subject.loaded, batch_size=_BATCH_SIZE.value)
        options = {"limit": _LIMIT.value, "num_fewshot": _FEWSHOT.value}
        found = lm_eval_adapter.run(model, _TASKS.value, path=_TASKS_PATH.value, **options)
        _write(out, "lm_eval", {"model": subject.name} | found, lm_eval_adapter.table(found))
    if not _RETRIEVAL.value and not _TASKS.value:
        options = {"max_batches": _BATCHES.value, "buckets": _BUCKETS.value, "out": out}
        split_scores.score(subject, _SPLIT.value, contexts, **options)


def _subject() -> subjects.Subject:
    config, read = flags.FLAGS.config, partial(subjects.read_split, split=_SPLIT.value)
    if _RETRIEVAL.value or _TASKS.value:
        read = None
    elif _SPLIT.value == "train" and not _BATCHES.value:
        raise cli.UserError("the training split has no end: give --max_batches")
    if _MODEL.value:
        return subjects.of_source(
            config, _MODEL.value, read, dtype=_DTYPE.value, max_len=_MAX_LEN.value
        )
    if _DTYPE.value or _MAX_LEN.value:
        raise cli.UserError("--dtype and --max_len go with --model")
    return subjects.of_run(config, _WORKDIR.value, read, step=_STEP.value)


def _write(out: Path | None, name: str, result: dict, table: str) -> None:
    if out:
        path = out / f"evaluation_{name}.json"
        run_record.write_json(path, result)
        print(f"{table}\n\nwritten: {path}")


def _config(flag) -> ConfigDict:
    if not flag("model"):
        return run_record.load_config(flag("workdir") or "")
    if flag("workdir"):
        raise cli.UserError("give --workdir or --model, not both")
    return subjects.new_config(flag("data") or _DATA.default)


if __name__ == "__main__":
    cli.run(main, config_from=_config, many_hosts=True)
