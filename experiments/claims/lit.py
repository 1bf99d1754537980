"""LiT: a linear denoiser begins with its teacher's weights and learns from its predictions."""

import jax

from configs import digits_denoise
from configs.linearize import lit
from experiments.claims import claim, pictures
from experiments.claims.context import changed
from experiments.linearization import run as linearization

# Name: arguments of configs/linearize/lit.py.
STUDENTS = {
    "from scratch": "scratch,no_distillation",
    "inherited": "no_distillation",
    "inherited, variance": "variance",
    "inherited, noise": "noise",
    "inherited, noise and variance": "",
}
TEACHER = {
    "model.objective": "noise",
    "model.learn_variance": True,
    "model.d_model": 32,
    "model.num_layers": 3,
    "data.batch_size": 32,
    "train.steps": 2500,
    "train.eval_every": 2500,
    "checkpoint.every": 2500,
}


def run(context):
    steps = 4 if context.smoke else 300
    teacher = context.train(digits_denoise.get_config("attention"), TEACHER)
    measured = {"teacher": teacher.result["loss"], "steps": steps, "students": {}}
    for name, argument in STUDENTS.items():
        losses = []
        for seed in context.seeds:
            config = lit.get_config(argument)
            config.linearize.teacher = str(teacher.workdir)
            config.data = teacher.config.data.copy_and_resolve_references()
            config.linearize.stages.stage_1.steps = steps
            config = changed(config, {"seed": seed, "data.seed": seed, "mesh.data": 1})
            config.train.eval_every = steps
            with context.work("lit", config.to_dict()) as folder:
                result = linearization.linearize(config, folder, jax.devices()[:1])
            losses.append(result["stages"]["stage_1"]["loss"])
        measured["students"][name] = losses
    return measured


def judge(measured):
    scratch, plain, variance, noise, both = measured["students"].values()
    return [
        claim.less("inherited weights are better than none", plain, scratch),
        claim.less("distilling the noise is better than no distillation", noise, plain),
        claim.less(
            "distilling the variance is better than none", variance, plain, every_seed=False
        ),
        claim.less("both are better than the noise alone", both, noise, every_seed=False),
        claim.less("both are better than the variance alone", both, variance),
    ]


def draw(measured, figure):
    """The students at two scales, since distillation changes less than inheritance."""
    students = measured["students"]
    inherited = dict(list(students.items())[1:])
    for axes, shown in zip(figure.subplots(2, 1, height_ratios=(5, 4)), (students, inherited)):
        pictures.bars(axes, shown, "")
        axes.axvline(measured["teacher"], color="black", linestyle="--", label="softmax teacher")
        values = [measured["teacher"], *(x for losses in shown.values() for x in losses)]
        spread = max(values) - min(values)
        axes.set_xlim(min(values) - 0.1 * spread, max(values) + 0.1 * spread)
    axes.set_xlabel(
        f"squared error of the predicted noise, test images, after {measured['steps']} steps"
    )


CLAIM = claim.Claim(
    title="A linear denoiser begins with its teacher's weights, and learns from its noise and "
    "variance",
    paper="arXiv 2501.12976",
    section="tables of initialisation and of hybrid distillation",
    published="DiT-S/2, FID after 400K steps: initialised at random 63.24, with a teacher's weights "
    "but attention's 53.83; then distilled: variance 53.49, noise 51.13, both 50.79.",
    ours="Digits, a softmax denoiser of 3 layers and width 32 (2500 steps) and students with LiT's "
    "mixer (300 steps). In place of FID we measure the squared error of the predicted noise on "
    "held-out images. What the variance adds, alone or beside the noise, is within the spread of the "
    "seeds: the order of the means is as published, and three seeds show no more.",
    seeds=3,
    minutes=5,
    run=run,
    judge=judge,
    draw=draw,
)
