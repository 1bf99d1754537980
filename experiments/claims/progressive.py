"""Progressive distillation: a sum of small students reaches its teacher at a part of its size."""

from configs import digits
from configs import progressive as config_of
from experiments.claims import claim, pictures
from experiments.claims.context import changed
from experiments.linearization import progressive

MARGIN = 0.01  # the paper's: students together stay within 1 % of the teacher


def run(context):
    teacher = context.train(digits.get_config("mamba"), {"train.steps": 500})
    config = config_of.get_config("mamba,tiny" if context.smoke else "mamba")
    config.progressive.teacher = str(teacher.workdir)
    config = changed(config, {"mesh.data": 1} | ({} if context.smoke else {"train.steps": 250}))
    with context.work("progressive", config.to_dict()) as folder:
        result = progressive.progress(config, folder)
    members, total, sizes = result["members"].values(), 0, []
    for scores in members:
        total += scores["parameters"]
        sizes.append(total / result["teacher"]["parameters"])
    return {
        "teacher": result["teacher"]["accuracy"],
        "sizes": sizes,
        "accuracies": [scores["accuracy"] for scores in members],
    }


def judge(measured):
    accuracies, teacher = measured["accuracies"], measured["teacher"]
    return [
        claim.less("the sum is better than its first student", accuracies[0], accuracies[-1], 0.02),
        claim.at_least("all students reach the teacher within 1 %", accuracies[-1],
                       round(teacher - MARGIN, 4)),
        claim.at_most("all have a part of the teacher's parameters", measured["sizes"][-1], 0.63),
    ]  # fmt: skip


def draw(measured, figure):
    axes = figure.subplots()
    points = list(zip(measured["sizes"], measured["accuracies"]))
    pictures.curves(
        axes, {"first students": points}, "parameters, of the teacher's", "test accuracy"
    )
    axes.axhline(measured["teacher"], color="black", linestyle="--", label="teacher")
    axes.axhspan(measured["teacher"] - MARGIN, measured["teacher"], color="black", alpha=0.1,
                 label="within 1 %")  # fmt: skip
    axes.set_ylim(top=1.005)


CLAIM = claim.Claim(
    title="A sum of small students, each trained on what those before it lack, reaches its teacher",
    paper="arXiv 2503.01727",
    section="abstract (the number from memory)",
    published="MNIST: a Mamba teacher has 98 %; seven students together, with 63 % of its FLOPs, "
    "98 %; the weakest, with 1 %, 72 %. CIFAR-10: all students are 1 % below the teacher.",
    ours="Digits: a bidirectional Mamba of width 64 (500 steps), and seven students of widths 4 to "
    "32 (250 steps each). The algorithm is from memory; parameters stand in place of FLOPs. One "
    "seed.",
    minutes=2,
    run=run,
    judge=judge,
    draw=draw,
)
