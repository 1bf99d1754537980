"""SLA (arXiv 2509.24006): the softmax attention of a denoiser becomes sparse-linear attention.

The student begins with all of its teacher's weights, attention's q, k, v and o too, and its linear
branch with a silent projection; it is fine-tuned on the denoiser's own loss.

    python -m experiments.train --config=configs/digits_denoise.py:attention,pixels \\
        --workdir=runs/dit
    python -m experiments.linearize --config=configs/linearize/sla.py \\
        --config.linearize.teacher=runs/dit --workdir=runs/sla

Blocks have 4 tokens, half a row of an image of 64 tokens, and a fifth of them are chosen.
Arguments: sparse_only and linear_only for the paper's ablations, full for all blocks; hybrid, half,
  tiny: configs/linearize/common.py.
"""

from configs import digits_denoise
from configs.linearize import common

FINE_TUNING = {"train": ".", "learning_rate": 5e-4, "steps": 300}


def get_config(arg: str = ""):
    data = digits_denoise.get_config("attention,pixels").data
    student = "sparse_linear(block_size=4, topk=0.2)"
    config = common.of_images(data, FINE_TUNING, student=student, inherit="qkvo")

    def options(text):
        return lambda config: config.linearize.update({"student": f"sparse_linear({text})"})

    return common.with_argument(
        config,
        arg,
        sparse_only=options("block_size=4, topk=0.2, mode='sparse_only'"),
        linear_only=options("mode='linear_only'"),
        full=options("block_size=4, topk=1.0, mode='sparse_only'"),
    )
