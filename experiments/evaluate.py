"""Scores a model on a split: text by position, images by class or time; retrieval; harness tasks.

    python -m experiments.evaluate --workdir=runs/quickstart-20261121-120000 --split=test
    python -m experiments.evaluate --workdir=... --config.data.seq_len=4096 --max_batches=20
    python -m experiments.evaluate --workdir=... --context_lengths=256,1024,4096
    python -m experiments.evaluate --workdir=... --retrieval=passkey,s_niah_2 --lengths=1024,8192
    python -m experiments.evaluate --workdir=... --lm_eval_tasks=arc_easy    # extra [eval]
    python -m experiments.evaluate --model=gguf:SmolLM2.gguf --data=text --config.data.paths=docs

Without --retrieval and --lm_eval_tasks a split of the run's data, or of --data, is scored, with any
option of the data overridden; --context_lengths scores it again in rows of each length: every label
once, from at most so many tokens before it. Of an encoder's run the table has accuracy by class,
and the picture which class was taken for which; of a denoiser's, loss by time. Tables go to JSON
and pictures, too: see --out.
"""

import datetime
from functools import partial
from pathlib import Path

import jax
from absl import flags

from experiments.data import needles
from experiments.inference import image_scores, retrieval, split_scores, subjects
from experiments.launch import cli
from experiments.training import run_record
from seqmodels import loading

_STRING, _LIST, _ENUM = flags.DEFINE_string, flags.DEFINE_list, flags.DEFINE_enum
_COUNT = partial(flags.DEFINE_integer, lower_bound=1)
_WORKDIR = _STRING("workdir", None, "the folder of a training run; its latest checkpoint")
_STEP = flags.DEFINE_integer("step", None, "another checkpoint of it")
_MODEL = _STRING("model", None, "in place of a run: what seqmodels.load takes, such as gguf:<file>")
_DTYPE = _ENUM("dtype", None, loading.DTYPES, "with --model: of the weights; default: the file's")
_MAX_LEN = _COUNT("max_len", None, "with --model: tokens that full-attention layers can hold")
_DATA = _ENUM("data", "python_stdlib", subjects.TEXTS, "with --model: text to score it on")
_OUT = _STRING("out", None, "for results; default: the workdir, or a new folder below runs")
_SPLIT = _ENUM("split", "test", ["train", "validation", "test"], "what to score")
_BATCHES = flags.DEFINE_integer("max_batches", 0, "of the split; 0: all of it", lower_bound=0)
_BUCKETS = _COUNT("buckets", 16, "rows of the table by position, length or time")
_CONTEXTS = _LIST("context_lengths", [], "lengths of rows to score again in")
_RETRIEVAL = _LIST("retrieval", [], f"some of {', '.join(needles.FORMS)}")
_LENGTHS = _LIST("lengths", list(map(str, retrieval.LENGTHS)), "of retrieval, in tokens")
_DEPTHS = _LIST("depths", list(map(str, retrieval.DEPTHS)), "of retrieval, 0 to 1")
_EXAMPLES = _COUNT("examples", 10, "of retrieval, for each length and depth")
_BATCH_SIZE = _COUNT("batch_size", 8, "prompts read and continued together")
_TASKS = _LIST("lm_eval_tasks", [], "tasks of the evaluation harness")
_TASKS_PATH = _STRING("lm_eval_path", None, "a folder with task files of your own")
_LIMIT = _COUNT("lm_eval_limit", None, "examples of each task")
_FEWSHOT = flags.DEFINE_integer("lm_eval_fewshot", None, "solved examples shown before each")


def main(argv):
    cli.no_arguments(argv)
    contexts, lengths = (cli.numbers(f.name, f.value, least=2) for f in (_CONTEXTS, _LENGTHS))
    depths = cli.numbers("depths", _DEPTHS.value, float, least=0)
    asked = [f.name for f in (_RETRIEVAL, _TASKS, _CONTEXTS) if f.value]  # of a language model
    config = flags.FLAGS.config
    split = None if _RETRIEVAL.value or _TASKS.value else _SPLIT.value
    if split == "train" and not _BATCHES.value:
        raise cli.UserError("the training split has no end: give --max_batches")
    if _MODEL.value:
        options = {"dtype": _DTYPE.value, "max_len": _MAX_LEN.value}
        subject = subjects.of_source(config, _MODEL.value, split, **options)
    elif _DTYPE.value or _MAX_LEN.value:
        raise cli.UserError("--dtype and --max_len go with --model")
    else:
        subject = subjects.of_run(config, _WORKDIR.value, split, _STEP.value, asked)
    for length in contexts:
        subject.program.model.check_length(length)
    out = None
    if jax.process_index() == 0:  # the others only compute
        new = f"runs/evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        out = cli.output_folder(_OUT.value or _WORKDIR.value or new)
        print(subject.name)
    if _RETRIEVAL.value:
        cells = _RETRIEVAL.value, lengths, depths, _EXAMPLES.value
        options = {"batch_size": _BATCH_SIZE.value, "seed": config.seed}
        rows = retrieval.evaluate(subject.loaded, *cells, **options)
        _write(out, "retrieval", {"model": subject.name, "rows": rows}, retrieval.table(rows))
    if _TASKS.value:
        from experiments.inference import lm_eval_adapter  # an extra

        model = lm_eval_adapter.HarnessModel(subject.loaded, batch_size=_BATCH_SIZE.value)
        options = {"limit": _LIMIT.value, "num_fewshot": _FEWSHOT.value}
        found = lm_eval_adapter.run(model, _TASKS.value, path=_TASKS_PATH.value, **options)
        _write(out, "lm_eval", {"model": subject.name} | found, lm_eval_adapter.table(found))
    if split:
        options = {"max_batches": _BATCHES.value, "buckets": _BUCKETS.value, "out": out}
        if subjects.is_language_model(subject.config):
            split_scores.score(subject, split, contexts, **options)
        else:
            image_scores.score(subject, split, **options)


def _write(out: Path | None, name: str, result: dict, table: str) -> None:
    if out:
        run_record.write_json(out / f"evaluation_{name}.json", result)
        print(f"{table}\n\nwritten: {out}/evaluation_{name}.json")


if __name__ == "__main__":
    cli.run(main, config_from=subjects.config_of, many_hosts=True)
