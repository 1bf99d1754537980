"""Scores a model on a split of its data, and writes tables, JSON and pictures of the result."""

import functools
from collections.abc import Sequence
from pathlib import Path

from experiments.inference import subjects
from experiments.inference.subjects import Subject
from experiments.training import evaluation, plots, run_record


def score(
    subject: Subject,
    split: str,
    context_lengths: Sequence[int] = (),
    *,
    max_batches: int = 0,
    buckets: int = 16,
    out: Path | None,
) -> None:
    """Scores a model on a split; prints tables, and writes a JSON file and pictures into `out`.

    Tables are by position in a document, for synthetic tasks by length. With out=None, as on all
    processes but the first, the scores are only computed.

    context_lengths: the text is scored again in rows of each of these lengths, in tokens.
    max_batches: number of the split's batches to score; 0 is all.
    buckets: number of rows of a table.
    """
    scores = evaluation.evaluate(subject.program, subject.params, subject.dataset, max_batches)
    read = functools.partial(subjects.read_split, split=split)
    by_context = evaluation.by_context(
        subject.config, subject.params, read, context_lengths, max_batches
    )
    totals = scores.totals()
    evaluation.check_finite(subject.name, totals["loss"])
    if out is None:
        return
    what = "position" if subject.loaded else "length"
    table = (scores.by_position if subject.loaded else scores.by_length)(buckets)
    result = totals | {"model": subject.name, "step": subject.step, "split": split}
    result[f"by_{what}"] = table
    if by_context:
        result["by_context"] = [
            s.totals() | {"context": length, "by_position": s.by_position(buckets)}
            for length, s in by_context.items()
        ]
    path = out / f"evaluation_{split}"
    run_record.write_json(path.with_suffix(".json"), result)
    plots.bucket_curve(table, what, path.with_suffix(".png"))
    _print_totals(result, what, table)
    if by_context:
        _print_contexts(result["by_context"], [s.late_loss() for s in by_context.values()])
        curves = {f"{row['context']:,}": row["by_position"] for row in result["by_context"]}
        plots.loss_by_position(curves, out / f"{path.name}_context.png")
    print(f"\nwritten: {path}.json, {path}.png")


def _print_totals(result: dict, what: str, table: Sequence[dict]) -> None:
    print(f"{result['split']} split")
    for key in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"):
        if key in result:
            digits = 0 if key == "tokens" else 4
            print(f"  {key.replace('_', ' '):<14} {result[key]:>12,.{digits}f}")
    print(f"\n  {what:>12}     tokens      loss  perplexity  accuracy")
    for row in table:
        print(f"  {row['first']}-{row['last']}".rjust(14) + _columns(row))


def _print_contexts(rows: Sequence[dict], late_losses: Sequence[float]) -> None:
    print("\n       context     tokens      loss  perplexity  accuracy  last quarter's loss")
    for row, late_loss in zip(rows, late_losses):
        print(f"  {row['context']:>12,}{_columns(row)} {late_loss:>20.4f}")


def _columns(row: dict) -> str:
    return (
        f" {row['tokens']:>10,} {row['loss']:>9.4f} {row['perplexity']:>11.3f} "
        f"{row['accuracy']:>9.4f}"
    )
