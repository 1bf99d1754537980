"""LION: a linear RNN over larger groups of a point set's tokens is more accurate."""

from configs import digits
from experiments.claims import claim, pictures

GROUPS = (2, 8, 64)  # a digit has at most 64 points


def run(context):
    config = digits.get_config("lion,points")
    changes = {
        "data.batch_size": 32,
        "data.order": "random",
        "model.position_embedding": "none",
        "model.num_layers": 2,
        "train.steps": 150,
        "train.eval_every": 150,
    }
    found = {}
    for group in GROUPS:
        pattern = f"lion(mixer='retnet', group={group}, window=4)"
        runs = [
            context.train(config, changes | {"model.pattern": pattern}, seed=seed)
            for seed in context.seeds
        ]
        found[str(group)] = {key: [run.result[key] for run in runs] for key in ("accuracy", "loss")}
    return found


def judge(measured):
    small, middle, large = (measured[str(group)] for group in GROUPS)
    return [
        claim.less("groups of 8 beat groups of 2", small["accuracy"], middle["accuracy"]),
        claim.less("the whole set beats groups of 2", small["accuracy"], large["accuracy"]),
        claim.less(
            "the whole set has a lower loss than groups of 8",
            large["loss"],
            middle["loss"],
            every_seed=False,
        ),
    ]


def draw(measured, figure):
    left, right = figure.subplots(1, 2)
    for axes, key, unit in ((left, "accuracy", ""), (right, "loss", ", nats")):
        points = [(group, measured[str(group)][key]) for group in GROUPS]
        pictures.curves(
            axes, {"mean of the seeds": points}, "group size G, tokens", f"held-out {key}{unit}"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(GROUPS, [*map(str, GROUPS[:-1]), "64 (all)"])


CLAIM = claim.Claim(
    title="A linear RNN over larger groups of points classifies better",
    paper="arXiv 2407.18232",
    section="section 4.3, ablation of the group size",
    published="On Waymo, groups of thousands of voxels, which only a linear RNN can afford, detect "
    "better than groups of the few dozens that window attention has.",
    ours="Digits as sets of 20 to 64 lit pixels in random order (intensity and place as features); "
    "two layers of LION with RetNet, windows of 4x4, x-major and y-major; 150 steps of 32 digits.",
    seeds=3,
    minutes=2,
    run=run,
    judge=judge,
    draw=draw,
    figure_size=(9.0, 3.6),
)
