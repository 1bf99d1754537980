"""Shallow feed-forward networks in place of a trained transformer's attention (arXiv 2311.10642).

Each network learns what its teacher's layer gives for the same input, by mean squared error.

    python -m experiments.train --config=configs/digits.py:attention --workdir=runs/teacher
    python -m experiments.linearize --config=configs/linearize/shallow_ffn.py:m \\
        --config.linearize.teacher=runs/teacher --workdir=runs/shallow

Arguments: the network's size, xs, s, m, l (default) or xl; alrr and elr replace the residual
  connection, or the whole layer, too (`seqmodels.linearize.transfer`: by default attention alone,
  ALR), heads gives a network to each head (ALSR); hybrid, half, tiny: configs/linearize/common.py.
  The paper's Adam has a learning rate of 1e-4 and b1, b2 of 0.9, 0.98; ours is higher.
"""

from configs import digits
from configs.linearize import common
from seqmodels.modules import sentence_ffn

TRANSFER = {
    "objective": "transfer",
    "train": "/mixer/",
    "mixer": 1.0,
    "learning_rate": 1e-3,
    "steps": 1000,
}


def get_config(arg: str = ""):
    data = digits.get_config().data
    config = common.of_images(data, TRANSFER, student="shallow_ffn()")
    config.optimizer.b2 = 0.98

    def option(text):
        def add(config):
            inside = config.linearize.student.removesuffix(")")
            config.linearize.student = inside + ("" if inside[-1] == "(" else ", ") + text + ")"

        return add

    def level(distance, text):
        def change(config):
            option(text)(config)
            config.linearize.stages.stage_1.update({"mixer": 0.0, distance: 1.0})

        return change

    return common.with_argument(
        config,
        arg,
        alrr=level("residual", "mixer_residual=(0.0, 1.0)"),
        elr=level("block", "mixer_residual=(0.0, 1.0), channel_mixer=None"),
        heads=option("num_heads=4"),
        **{size: option(f"size={size!r}") for size in sentence_ffn.SIZES},
    )
