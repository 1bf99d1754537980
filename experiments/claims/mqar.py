"""MQAR: a recurrence that erases what it overwrites recalls, a sum of outer products does not."""

from configs import mqar
from experiments.claims import claim, pictures

MIXERS = ("attention", "delta_net", "linear_attention")
PAPER = {"attention": 1.0, "delta_net": 1.0}


def run(context):
    return {
        name: [
            context.train(mqar.get_config(name), {"train.steps": 700}, seed=seed).result["accuracy"]
            for seed in context.seeds
        ]
        for name in MIXERS
    }


def judge(measured):
    return [
        claim.at_least("softmax attention recalls", measured["attention"], 0.95),
        claim.at_least("DeltaNet recalls", measured["delta_net"], 0.95),
        claim.less(
            "linear attention recalls less than DeltaNet",
            measured["linear_attention"],
            measured["delta_net"],
            margin=0.3,
        ),
    ]


def draw(measured, figure):
    axes = figure.subplots()
    pictures.bars(axes, measured, "accuracy on queried keys of held-out sequences", PAPER)
    axes.set_xlim(0, 1.05)


CLAIM = claim.Claim(
    title="The delta rule recalls values by their keys as softmax attention does; linear "
    "attention does not",
    paper="arXiv 2312.04927",
    section="figure 2; DeltaNet: arXiv 2406.06484, figure 2",
    published="Attention solves multi-query associative recall at every width, accuracy about 1.0; "
    "models without input-dependent mixing fall behind as pairs are added. DeltaNet solves its "
    "hardest setting (512 tokens, 64 pairs).",
    ours="Two layers of width 64 on 64 tokens with 4 pairs, 512 token ids, 700 steps of 64 "
    "sequences; accuracy on 1024 held-out sequences.",
    seeds=3,
    minutes=12,
    run=run,
    judge=judge,
    draw=draw,
)
