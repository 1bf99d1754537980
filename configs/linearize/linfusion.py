"""LinFusion (arXiv 2409.02097): the attention of a softmax denoiser is distilled, all else frozen.

The student begins with all of its teacher's weights, attention's q, k, v and o too, and its mixers
learn from L = L_simple + 0.5 |e_T - e_S|^2 + 0.5 sum_l |h_T - h_S|^2, h_l the hidden states after
layer l. The paper's AdamW has a learning rate of 1e-4 and no weight decay; ours is higher.

    python -m experiments.train --config=configs/digits_denoise.py:attention --workdir=runs/dit
    python -m experiments.linearize --config=configs/linearize/linfusion.py \\
        --config.linearize.teacher=runs/dit --workdir=runs/linfusion

Arguments: hybrid, half, tiny: configs/linearize/common.py.
"""

from configs import digits_denoise
from configs.linearize import common

DISTILL = {"train": "/mixer/", "noise": 0.5, "features": 0.5, "learning_rate": 1e-3, "steps": 1000}


def get_config(arg: str = ""):
    data = digits_denoise.get_config().data
    config = common.of_images(data, DISTILL, student="linfusion", inherit="qkvo")
    return common.with_argument(config, arg)
