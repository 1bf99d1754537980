"""Hybrids: the more of a teacher's softmax layers stay, the nearer the student comes to it."""

from experiments.claims import claim, linearizations, pictures

METHODS = {
    "liger": "none",
    "liger:hybrid": "one of four",
    "liger:half": "two of four",
    "window:softmax": "all",
}

PAPER = {"0": 47.7, "1": 48.0, "2": 48.4, "4": 51.5, "8": 55.1, "32": 66.0}


def run(context):
    rows = linearizations.students(context, list(METHODS), 1 / 3)
    return {name: row["perplexity"] for name, row in rows.items()}


def judge(measured):
    labels = list(METHODS.items())
    return [
        claim.less(
            f"softmax layers kept: {more} is better than {fewer}", measured[high], measured[low]
        )
        for (low, fewer), (high, more) in zip(labels, labels[1:])
    ]


def draw(measured, figure):
    ours, paper = figure.subplots(1, 2)
    values = {label: measured[name] for name, label in METHODS.items()}
    pictures.bars(ours, values, "perplexity of held-out text, per byte (lower is better)")
    ours.set_ylabel("softmax layers kept")
    ours.axvline(measured["teacher"], color="black", linestyle="--", label="our teacher")
    ours.set_xlim(0.95 * min(measured.values()), 1.02 * max(measured.values()))
    ours.set_title("here", fontsize=10)
    pictures.bars(paper, PAPER, "TextVQA, % (higher is better)")
    paper.set_title("paper, of 32 layers", fontsize=10)


CLAIM = claim.Claim(
    title="A student's quality rises with the number of softmax layers it keeps",
    paper="arXiv 2502.13145",
    section="table 5",
    published="mmMamba keeps 0, 1, 2, 4, 8 and all 32 softmax layers of its teacher: TextVQA 47.7, 48.0, "
    "48.4, 51.5, 55.1 and 66.0.",
    ours=linearizations.OURS.format(teacher="HoVLE-2.6B", steps="200 steps of 2,048 bytes")
    + "Liger's layers in place of Mamba-2's; all students are trained alike, also the one that "
    "keeps all layers.",
    minutes=5,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(9.0, 3.6),
)
