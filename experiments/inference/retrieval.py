"""Measures how often a model finds a needle (a hidden fact) in a long text, by length and depth."""

from collections.abc import Sequence

from experiments.data import needles
from seqmodels.loading import LoadedModel
from seqmodels.text import sampling

LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def evaluate(
    loaded: LoadedModel,
    forms: Sequence[str],
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    examples: int = 10,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict]:
    """Returns a row {task, length, depth, examples, accuracy} per task, length and depth.

    Accuracy is the share of examples whose answer occurs in the model's greedy continuation, up to
    the end of the line.

    forms: names of tasks, from `needles.FORMS`.
    lengths: tokens of a prompt and its answer.
    depths: where the needle stands in the text, from 0 (start) to 1 (end).
    examples: number of examples per row.

    Raises ValueError, before anything is generated, for an unknown task, length or depth.
    """
    cells = [(form, length, depth) for form in forms for length in lengths for depth in depths]
    asked = {
        (form, length, depth): [
            needles.make_example(form, loaded.encode, length, depth, seed=seed, number=number)
            for number in range(examples)
        ]
        for form, length, depth in cells
    }
    longest = {cell: max(e.answer_tokens for e in found) for cell, found in asked.items()}
    for cell, found in asked.items():
        sampling.check_length(loaded.model, max(len(e.prompt_N) for e in found), longest[cell])
    rows = []
    for cell, found in asked.items():
        prompts = [e.prompt_N.tolist() for e in found]
        said = loaded.generate(
            prompts, max_new_tokens=longest[cell], stop="\n", batch_size=batch_size
        )
        right = sum(e.answer in text for e, text in zip(found, said))
        row = dict(zip(("task", "length", "depth"), cell))
        rows.append(row | {"examples": examples, "accuracy": right / examples})
    return rows


def table(rows: Sequence[dict]) -> str:
    """Returns the rows of `evaluate` as a text table per task: lengths down, depths across."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        depths = sorted({row["depth"] for row in own})
        lines += [
            f"\n  {task}",
            "    length  depth" + "".join(f"{depth:>7.2f}" for depth in depths),
        ]
        for length in sorted({row["length"] for row in own}):
            found = {row["depth"]: row["accuracy"] for row in own if row["length"] == length}
            lines.append(f"  {length:>8,}       " + "".join(f"{found[d]:>7.2f}" for d in depths))
    return "\n".join(lines)
