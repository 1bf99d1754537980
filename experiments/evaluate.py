"""Scores the latest checkpoint of a run: loss, perplexity, bits per byte, accuracy; loss by position, and for tasks by length.

    python -m experiments.evaluate --workdir=runs/quickstart-20261121-120000 --split=test
    python -m experiments.evaluate --workdir=... --config.data.seq_len=4096 --max_batches=20

Every option of the run's data can be overridden, so a model can be scored on other lengths or other text. Beside the table it writes
evaluation_<split>.json and a picture into the workdir.
"""

from pathlib import Path

import jax
from absl import flags

from experiments import cli, distributed, evaluation, plots, restore, run_record, steps
from experiments.data import make_dataset
from seqmodels import sharding

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training run")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "what to score")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
_MAX_BATCHES = flags.DEFINE_integer("max_batches", 0, "score so many batches; 0: the whole split")
_BUCKETS = flags.DEFINE_integer("buckets", 16, "rows of the table")


def main(argv):
    cli.no_arguments(argv)
    config, workdir = flags.FLAGS.config, Path(_WORKDIR.value)
    if _SPLIT.value == "train" and not _MAX_BATCHES.value:
        raise cli.UserError("the training split has no end: give --max_batches")
    share = distributed.data_share(sharding.batch_sharding(sharding.make_mesh(config.mesh)))
    dataset = make_dataset(
        config.data, _SPLIT.value, process_index=share.index, process_count=share.count
    )
    seq_len = next(iter(dataset))["inputs"].shape[1]
    program = steps.build(config, seq_len)
    step, params = restore.evaluation_params(program, config, workdir, _STEP.value)
    scores = evaluation.evaluate(program, params, dataset, _MAX_BATCHES.value)
    if jax.process_index() == 0:
        _tell(scores, dataset, workdir, step)


def _tell(scores: evaluation.Scores, dataset, workdir: Path, step: int) -> None:
    result = scores.totals() | {"split": _SPLIT.value, "step": step}
    what = "position" if dataset.tokenizer else "length"
    table = (scores.by_position if dataset.tokenizer else scores.by_length)(_BUCKETS.value)
    result[f"by_{what}"] = table
    name = f"evaluation_{_SPLIT.value}"
    run_record.write_json(workdir / f"{name}.json", result)
    plots.bucket_curve(table, what, workdir / f"{name}.png")

    print(f"{workdir}, step {step}, {_SPLIT.value} split")
    for key in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"):
        if key in result:
            print(
                f"  {key.replace('_', ' '):<14} {result[key]:>12,.{0 if key == 'tokens' else 4}f}"
            )
    print(f"\n  {what:>12}     tokens      loss  accuracy")
    for row in table:
        place = f"{row['first']}-{row['last']}"
        print(f"  {place:>12} {row['tokens']:>10,} {row['loss']:>9.4f} {row['accuracy']:>9.4f}")
    print(f"\nwritten: {workdir / name}.json, {workdir / name}.png")


if __name__ == "__main__":
    cli.run(main, config_from="workdir", many_hosts=True)
