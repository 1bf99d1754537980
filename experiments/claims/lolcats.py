"""LoLCATs: teaching layers to imitate attention first is worth more than as many steps of LoRA."""

from experiments.claims import claim, linearizations, pictures

METHODS = {"lolcats": "with attention transfer", "lolcats:no_transfer": "without"}
PAPER = {  # table 7: size -> MMLU with and without
    "8B": (54.88, 51.44),
    "70B": (67.70, 28.74),
    "405B": (72.20, 33.86),
}


def run(context):
    rows = linearizations.students(context, list(METHODS), 1 / 2)
    return {
        name: {key: row[key] for key in ("perplexity", "tokens") if key in row}
        for name, row in rows.items()
    }


def judge(measured):
    with_transfer, without = (measured[name] for name in METHODS)
    same = with_transfer["tokens"] == without["tokens"]
    tokens = f"{with_transfer['tokens']:,} and {without['tokens']:,}"
    return [
        claim.Check("both are trained on as many tokens", same, tokens, "equal"),
        claim.less(
            "attention transfer lowers perplexity",
            with_transfer["perplexity"],
            without["perplexity"],
        ),
    ]


def draw(measured, figure):
    ours, paper = figure.subplots(1, 2)
    values = {label: measured[name]["perplexity"] for name, label in METHODS.items()}
    pictures.bars(ours, values, "perplexity per byte (lower is better)")
    ours.axvline(
        measured["teacher"]["perplexity"], color="black", linestyle="--", label="our teacher"
    )
    ours.set_title("here", fontsize=10)
    for place, scores in enumerate(PAPER.values()):
        for number, score in enumerate(scores):
            paper.barh(place + 0.4 * number, score, 0.4, color=f"C{number}", alpha=0.6)
    paper.set_yticks([0.2, 1.2, 2.2], list(PAPER))
    paper.invert_yaxis()
    paper.set(xlabel="MMLU, % (higher is better)")
    paper.set_title("paper, by the teacher's size (same colours)", fontsize=10)
    paper.grid(alpha=0.3, axis="x")


CLAIM = claim.Claim(
    title="Attention transfer before LoRA makes the better linear student at equal tokens",
    paper="arXiv 2410.10254",
    section="table 7",
    published="MMLU of linearized Llama 3.1 with attention transfer and without: 8B 54.88 and "
    "51.44, 70B 67.70 and 28.74, 405B 72.20 and 33.86.",
    ours=linearizations.OURS.format(teacher="Llama 3.1", steps="300 steps of 2,048 bytes")
    + "Perplexity per byte of held-out text.",
    minutes=4,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(9.0, 3.6),
)
