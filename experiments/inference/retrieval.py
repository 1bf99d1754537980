"""How often a model finds a needle in a haystack: accuracy by task, length and depth."""

import functools
from collections.abc import Callable, Collection, Sequence

from experiments.data import needles
from seqmodels.text import sampling

LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def evaluate(
    model,
    params,
    tokenizer,
    forms: Sequence[str],
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    *,
    examples: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    encode: Callable[[str], Sequence[int]] | None = None,
    stop_tokens: Collection[int] | None = None,
) -> list[dict]:
    """Rows task, length, depth, examples, accuracy: the share of examples whose answer is in what
    the model says next, greedily, up to the end of the line.

    lengths: tokens of a prompt and its answer.   See `needles` for the tasks.
    encode: a prompt to its ids; None starts a document.   stop_tokens: as `sampling.generate` has
      them.
    Raises ValueError for what `needles.make_example` and `sampling.generate` refuse, before
      anything is generated.
    """
    encode = encode or functools.partial(sampling.prompt_tokens, tokenizer=tokenizer)
    cells = [(form, length, depth) for form in forms for length in lengths for depth in depths]
    asked = {
        (form, length, depth): [
            needles.make_example(form, encode, length, depth, seed=seed, number=number)
            for number in range(examples)
        ]
        for form, length, depth in cells
    }
    longest = {cell: max(e.answer_tokens for e in found) for cell, found in asked.items()}
    for cell, found in asked.items():
        sampling.check_length(model, max(len(e.prompt_N) for e in found), longest[cell])
    rows = []
    for cell, found in asked.items():
        said = sampling.generate(
            model, params, tokenizer, [e.prompt_N.tolist() for e in found], longest[cell],
            batch_size=batch_size, stop=("\n",), stop_tokens=stop_tokens, temperature=0,
        )  # fmt: skip
        right = sum(e.answer in text for e, text in zip(found, said))
        row = dict(zip(("task", "length", "depth"), cell))
        rows.append(row | {"examples": examples, "accuracy": right / examples})
    return rows


def table(rows: Sequence[dict]) -> str:
    """For people: lengths down, depths across."""
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
