"""Diffusion of scikit-learn's handwritten digits (8x8 pixels) by a denoiser of any one mixer.

    python -m experiments.train --config=configs/digits_denoise.py:linfusion --workdir=runs/d
    python -m experiments.generate --workdir=runs/d --guidance=2

Arguments are those of configs/digits.py. The objective is velocity; a tenth of the training images
hide their class, so that samples can be guided.
"""

from configs import common, digits


def get_config(arg: str = digits.DEFAULT):
    name, argument = digits.split_argument(arg)
    config = digits.get_config(name)
    config.data.update({"task": "denoising"})
    config.model.update({"architecture": "denoiser", "num_layers": 4})
    config.optimizer.update({"learning_rate": 3e-3, "weight_decay": 0.0})
    config.train.update({"steps": 1000, "log_every": 100, "eval_every": 500})
    config.checkpoint.update({"every": 1000, "keep": 1})
    return common.with_argument(config, argument, pixels=digits.pixels, pack=digits.pack)
