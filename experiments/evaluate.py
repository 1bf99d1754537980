"""Scores a model: perplexity by position and by length of context, retrieval from long texts, tasks
of the evaluation harness.

    python -m experiments.evaluate --workdir=runs/quickstart-20261121-120000 --split=test
    python -m experiments.evaluate --workdir=... --config.data.seq_len=4096 --max_batches=20
    python -m experiments.evaluate --workdir=... --context_lengths=256,1024,4096
    python -m experiments.evaluate --workdir=... --retrieval=passkey,s_niah_2 --lengths=1024,8192
      --depths=0,0.5,1
    python -m experiments.evaluate --workdir=... --lm_eval_tasks=arc_easy        # needs pip install
      '.[eval]'
    python -m experiments.evaluate --model=gguf:SmolLM2.gguf --data=text --config.data.paths=docs

What is scored is the latest checkpoint of a run (--workdir), or any source of pretrained weights
(--model), as `convert` takes them. Without --retrieval and --lm_eval_tasks it is scored on a split
of the run's data, or of --data: loss, perplexity, bits per byte, accuracy; by position, or for
tasks by length. Every option of the data can be overridden, so a model can be scored on other
lengths or other text. Beside the tables JSON and pictures are written, into the workdir or --out.

--context_lengths scores the same text again in rows of each length: every target once, from at most
  so many tokens before it.
--retrieval: see experiments/data/needles.py for the tasks.   --lm_eval_tasks: see
  experiments/inference/lm_eval_adapter.py.
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.data import default_config, make_dataset, needles
from experiments.inference import pretrained, retrieval
from experiments.launch import cli, distributed
from experiments.training import evaluation, plots, restore, run_record, steps
from seqmodels import sharding
from seqmodels.text import sampling
from seqmodels.text.tokenizers import BYTES, make_tokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_MODEL = flags.DEFINE_string("model", None, "in place of a run: a folder, gguf:<file>, a hub name")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, pretrained.DTYPES, "with --model: of the weights; default: the file's"
)
_MAX_LEN = flags.DEFINE_integer(
    "max_len",
    None,
    "with --model: tokens that full-attention layers hold when generating",
    lower_bound=1,
)
_DATA = flags.DEFINE_enum(
    "data", "python_stdlib", ["python_stdlib", "text", "tfds"], "with --model: text to score it on"
)
_OUT = flags.DEFINE_string(
    "out", None, "the folder for results; default: the workdir, or a new one below runs"
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "what to score")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_MAX_BATCHES = flags.DEFINE_integer(
    "max_batches", 0, "score so many batches; 0: the whole split", lower_bound=0
)
_BUCKETS = flags.DEFINE_integer("buckets", 16, "rows of the table", lower_bound=1)
_CONTEXT_LENGTHS = flags.DEFINE_list("context_lengths", [], "lengths of rows to score again in")
_RETRIEVAL = flags.DEFINE_list("retrieval", [], f"some of {', '.join(needles.FORMS)}")
_LENGTHS = flags.DEFINE_list(
    "lengths", list(map(str, retrieval.LENGTHS)), "of retrieval, in tokens"
)
_DEPTHS = flags.DEFINE_list("depths", list(map(str, retrieval.DEPTHS)), "of retrieval, 0 to 1")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 10, "of retrieval, for each length and depth", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "prompts read and continued together", lower_bound=1
)
_TASKS = flags.DEFINE_list("lm_eval_tasks", [], "tasks of the evaluation harness")
_TASKS_PATH = flags.DEFINE_string("lm_eval_path", None, "a folder with task files of your own")
_LIMIT = flags.DEFINE_integer("lm_eval_limit", None, "examples of each task", lower_bound=1)
_FEWSHOT = flags.DEFINE_integer("lm_eval_fewshot", None, "solved examples shown before each")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored. params lie as `program` has them. step: of a run. found: as a pretrained
    model's files have it."""

    name: str
    config: ConfigDict
    program: steps.Program
    params: Any
    tokenizer: Any
    dataset: Any
    step: int | None = None
    found: pretrained.Loaded | None = None


def main(argv):
    cli.no_arguments(argv)
    if not _MODEL.value and (_DTYPE.value or _MAX_LEN.value):
        raise cli.UserError("--dtype and --max_len go with --model")
    lengths = cli.numbers("context_lengths", _CONTEXT_LENGTHS.value, least=2)
    subject = _pretrained() if _MODEL.value else _of_run()
    for length in lengths:
        subject.program.model.check_length(length)
    out = Path(_OUT.value or _WORKDIR.value or _new_folder())
    first = jax.process_index() == 0
    if first:
        cli.output_folder(out)
        print(subject.name)
    if _RETRIEVAL.value:
        _find_needles(subject, out, first)
    if _TASKS.value:
        _run_tasks(subject, out, first)
    if not _RETRIEVAL.value and not _TASKS.value:
        _score_split(subject, lengths, out, first)


def _of_run() -> Subject:
    config = restore.reading_config(flags.FLAGS.config)
    dataset, seq_len = _dataset(config)
    program = steps.build(config, seq_len)
    step, params = restore.evaluation_params(program, config, Path(_WORKDIR.value), _STEP.value)
    name = f"{_WORKDIR.value}, step {step}"
    return Subject(name, config, program, params, _tokenizer(config), dataset, step)


def _pretrained() -> Subject:
    config = flags.FLAGS.config
    loaded = pretrained.load(_MODEL.value, config.data.tokenizer, dtype=_DTYPE.value)
    max_len = _MAX_LEN.value
    if max_len is None and _RETRIEVAL.value:
        max_len = max(cli.numbers("lengths", _LENGTHS.value, least=2))
    if max_len is not None:
        loaded = loaded.with_max_len(max_len)
    config.model = dict(loaded.found.model_config)
    config.data.update(
        {"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token}
    )
    dataset, seq_len = _dataset(config)
    if dataset is None:
        seq_len = min(seq_len, loaded.model.learned_positions or seq_len)
    program = steps.build(config, seq_len)
    params = jax.tree.map(
        lambda p, a: jax.device_put(p, a.sharding), loaded.params, program.abstract_state.params
    )
    return Subject(_MODEL.value, config, program, params, loaded.tokenizer, dataset, found=loaded)


def _config(flag) -> ConfigDict:
    """Of the run, or one that a pretrained model's fields come into."""
    if not flag("model"):
        return run_record.load_config(flag("workdir") or "")
    if flag("workdir"):
        raise cli.UserError("give --workdir or --model, not both")
    from configs import common

    config = common.get_config()
    config.data = default_config(flag("data") or _DATA.default)
    config.data.tokenizer = ""  # the model's
    return config


def _dataset(config):
    """(dataset, tokens a row) of what is scored on; (None, as trained) where nothing of the data is
    read."""
    if _RETRIEVAL.value or _TASKS.value:
        return None, config.data.get("seq_len", 8)
    if _SPLIT.value == "train" and not _MAX_BATCHES.value:
        raise cli.UserError("the training split has no end: give --max_batches")
    dataset = _make_dataset(config)
    if dataset.vocab_size > config.model.vocab_size:
        raise cli.UserError(
            f"the data has ids up to {dataset.vocab_size - 1}, and the model a vocabulary of {config.model.vocab_size}: score it "
            "with the tokenizer that it was trained with"
        )
    return dataset, next(iter(dataset))["inputs"].shape[1]


def _make_dataset(config):
    share = distributed.data_share(sharding.batch_sharding(sharding.make_mesh(config.mesh)))
    return make_dataset(
        config.data, _SPLIT.value, process_index=share.index, process_count=share.count
    )


def _tokenizer(config):
    if "tokenizer" in config.data:
        return make_tokenizer(config.data.tokenizer, config.data.document_token)
    for flag in (_RETRIEVAL, _TASKS, _CONTEXT_LENGTHS):
        if flag.value:
            raise cli.UserError(
                f"the run's data, {config.data.name!r}, is not text: --{flag.name} needs a language model"
            )
    return None


def _score_split(subject: Subject, lengths, out: Path, first: bool) -> None:
    scores = evaluation.evaluate(
        subject.program, subject.params, subject.dataset, _MAX_BATCHES.value
    )
    by_context = evaluation.by_context(
        subject.config, subject.params, _make_dataset, lengths, _MAX_BATCHES.value
    )
    evaluation.check_finite(subject.name, scores.totals()["loss"])
    if not first:
        return
    what_of = {"model": subject.name, "step": subject.step, "split": _SPLIT.value}
    result = scores.totals() | what_of
    what = "position" if subject.tokenizer else "length"
    table = (scores.by_position if subject.tokenizer else scores.by_length)(_BUCKETS.value)
    result[f"by_{what}"] = table
    if by_context:
        result["by_context"] = [
            scores.totals() | {"context": length, "by_position": scores.by_position(_BUCKETS.value)}
            for length, scores in by_context.items()
        ]
    name = f"evaluation_{_SPLIT.value}"
    run_record.write_json(out / f"{name}.json", result)
    plots.bucket_curve(table, what, out / f"{name}.png")

    print(f"{_SPLIT.value} split")
    for key in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"):
        if key in result:
            print(
                f"  {key.replace('_', ' '):<14} {result[key]:>12,.{0 if key == 'tokens' else 4}f}"
            )
    print(f"\n  {what:>12}     tokens      loss  perplexity  accuracy")
    for row in table:
        place = f"{row['first']}-{row['last']}"
        print(
            f"  {place:>12} {row['tokens']:>10,} {row['loss']:>9.4f} {row['perplexity']:>11.3f} {row['accuracy']:>9.4f}"
        )
    if by_context:
        print("\n       context     tokens      loss  perplexity  accuracy  last quarter's loss")
    for row in result.get("by_context", ()):
        print(
            f"  {row['context']:>12,} {row['tokens']:>10,} {row['loss']:>9.4f} {row['perplexity']:>11.3f} "
            f"{row['accuracy']:>9.4f} {by_context[row['context']].late_loss():>20.4f}"
        )
    if by_context:
        curves = {f"{length:,}": s.by_position(_BUCKETS.value) for length, s in by_context.items()}
        plots.loss_by_position(curves, out / f"{name}_context.png")
    print(f"\nwritten: {out / name}.json, {out / name}.png")


def _find_needles(subject: Subject, out: Path, first: bool) -> None:
    rows = retrieval.evaluate(
        subject.program.model,
        subject.params,
        subject.tokenizer,
        _RETRIEVAL.value,
        cli.numbers("lengths", _LENGTHS.value, least=2),
        cli.numbers("depths", _DEPTHS.value, float, least=0),
        examples=_EXAMPLES.value,
        batch_size=_BATCH_SIZE.value,
        seed=subject.config.seed,
        encode=subject.found and subject.found.encode,
        stop_tokens=subject.found and subject.found.stop_tokens,
    )
    if first:
        path = out / "evaluation_retrieval.json"
        run_record.write_json(path, {"model": subject.name, "rows": rows})
        print(retrieval.table(rows))
        print(f"\nwritten: {path}")


def _run_tasks(subject: Subject, out: Path, first: bool) -> None:
    from experiments.inference import lm_eval_adapter  # an extra

    harness_model = lm_eval_adapter.HarnessModel(
        subject.program.model,
        subject.params,
        subject.tokenizer,
        batch_size=_BATCH_SIZE.value,
        **_as_the_harness_asks(subject),
    )
    results = lm_eval_adapter.run(
        harness_model,
        _TASKS.value,
        path=_TASKS_PATH.value,
        limit=_LIMIT.value,
        num_fewshot=_FEWSHOT.value,
    )
    if first:
        path = out / "evaluation_lm_eval.json"
        run_record.write_json(path, {"model": subject.name} | results)
        print(lm_eval_adapter.table(results))
        print(f"\nwritten: {path}")


def _as_the_harness_asks(subject: Subject) -> dict[str, Any]:
    """Runs have learned documents with their first token; pretrained models are asked as the
    harness asks transformers', with no more than their context."""
    found, positions = subject.found, subject.program.model.learned_positions
    if found is None:
        run = pretrained.of_run(subject.config, subject.params, _WORKDIR.value)
        stop_tokens = pretrained.with_tokenizer(run).stop_tokens
        return {"document_starts": True, "stop_tokens": stop_tokens, "max_length": positions}
    if found.tokenizer_name == BYTES:
        return {"document_starts": True, "max_length": positions}
    tokens = found.found.tokens
    limit = sampling.context_limit(subject.program.model)
    return {
        "prefix_token": next(iter(tokens.eos), None) if tokens.bos is None else tokens.bos,
        "encode": found.encode,
        "stop_tokens": found.stop_tokens,
        "max_length": limit and limit[0],
    }


def _new_folder() -> Path:
    return Path("runs") / f"evaluation-{datetime.datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    cli.run(main, config_from=_config, many_hosts=True)
