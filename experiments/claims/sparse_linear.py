"""SLA: softmax over a fifth of the blocks needs the linear branch, and the reverse more so."""

import json

import jax
import numpy as np

from configs import digits_denoise
from configs.linearize import sla
from experiments.claims import claim, pictures
from experiments.linearization import run as linearization

NAMES = {
    "full": "full softmax attention",
    "": "SLA: a fifth of the blocks, and linear",
    "sparse_only": "a fifth of the blocks only",
    "linear_only": "linear attention only",
}


def run(context):
    found = {label: [] for label in ("before", *NAMES.values())}
    for seed in context.seeds:
        config = digits_denoise.get_config("attention,pixels")
        changes = {
            "model.num_layers": 3,
            "data.batch_size": 32,
            "train.steps": 300,
            "schedule.warmup_steps": 50,
        }
        teacher = context.train(config, changes, seed=seed)
        found["before"].append(teacher.result["loss"])
        for argument, label in NAMES.items():
            config = sla.get_config(argument + ("," * bool(argument) + "tiny") * context.smoke)
            config.mesh.data, config.seed = 1, seed
            config.linearize.teacher = str(teacher.workdir)
            with config.unlocked():
                config.data = teacher.config.data
            if not context.smoke:
                config.linearize.stages.stage_1.update({"steps": 150, "learning_rate": 2e-3})
            with context.work("sla", config.to_dict()) as folder:
                linearization.linearize(config, folder, jax.devices()[:1])
                result = json.loads((folder / "stage_1" / "result.json").read_text())
            found[label].append(result["loss"])
    return found


def judge(measured):
    full, both, sparse, linear = (np.array(measured[label]) for label in NAMES.values())
    return [
        claim.less("SLA is nearer to full attention than to sparse attention alone",
                   list(both - full), list(sparse - both)),
        claim.less("sparse attention alone is worse than SLA", list(both), list(sparse)),
        claim.less("linear attention alone is much worse: at least twice as far from full attention "
                   "as sparse attention alone", list(2 * (sparse - full)), list(linear - full)),
    ]  # fmt: skip


def draw(measured, figure):
    axes = figure.subplots()
    values = {label: measured[label] for label in NAMES.values()}
    pictures.bars(
        axes, values, "held-out loss of the denoiser (mean squared error; lower is better)"
    )
    axes.axvline(np.mean(measured["before"]), color="black", linestyle="--", label="the teacher")
    everything = np.concatenate(list(measured.values()))
    axes.set_xlim(0.98 * everything.min(), 1.02 * everything.max())


CLAIM = claim.Claim(
    title="A fifth of the blocks by softmax and the rest by linear attention nearly equals full "
    "attention after a short fine-tuning",
    paper="arXiv 2509.24006",
    section="table 1 and its ablations",
    published="SLA at 95 % sparsity keeps the video quality of full attention; its sparse part alone "
    "and linear attention alone, fine-tuned alike, do not, linear attention by far the least.",
    ours="A denoiser of 8x8 digits (64 tokens, 3 layers of width 64) trained for 300 steps with "
    "softmax attention; then each variant fine-tuned from its weights for 150 steps. Blocks of 4 "
    "tokens, 3 of 16 chosen: 81 % sparsity.",
    seeds=1,
    minutes=2,
    tried="On digits SLA and its sparse part alone end equally far from full attention. A first size, "
    "100 steps at learning rate 5e-4, showed no more: 0.610 for SLA, 0.568 for full attention.",
    run=run,
    judge=judge,
    draw=draw,
)
