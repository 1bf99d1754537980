"""LiT (arXiv 2501.12976): a softmax denoiser becomes one of linear attention with few heads.

The student inherits all weights but attention's, and is trained on the denoiser's own loss and on
its teacher's noise and variance, L = L_simple + 0.5 |e_T - e_S|^2 + 0.05 |s_T - s_S|^2.

    python -m experiments.train --config=configs/digits_denoise.py:attention --workdir=runs/dit \\
        --config.model.objective=noise --config.model.learn_variance=True
    python -m experiments.linearize --config=configs/linearize/lit.py \\
        --config.linearize.teacher=runs/dit --workdir=runs/lit
    python -m experiments.generate --workdir=runs/lit/student

Arguments: the paper's ablations of the distillation, noise, variance and no_distillation for one of
  its two terms or none; and of inheritance, scratch, q, k, v, kv, qkv and qkvo; hybrid, half, tiny:
  configs/linearize/common.py.
"""

from configs import digits_denoise
from configs.linearize import common
from seqmodels.linearize import inherit

DISTILL = {"train": ".", "noise": 0.5, "variance": 0.05, "learning_rate": 2e-3, "steps": 1000}


def get_config(arg: str = ""):
    config = common.of_images(
        digits_denoise.get_config().data, DISTILL, student="lit", inherit="all_but_attention"
    )

    def weights(**changed):
        return lambda config: config.linearize.stages.stage_1.update(changed)

    def rule(name):
        return lambda config: config.linearize.update({"inherit": name})

    rules = {name: rule(name) for name in inherit.RULES if set(name) <= set("qkvo")}
    return common.with_argument(
        config,
        arg,
        noise=weights(variance=0.0),
        variance=weights(noise=0.0),
        no_distillation=weights(noise=0.0, variance=0.0),
        scratch=rule("none"),
        **rules,
    )
