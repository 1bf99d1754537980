"""Moving digits: short synthetic videos (8 frames of 16x16 pixels) of a digit that bounces.

    python -m experiments.train --config=configs/moving_digits.py:mala
    python -m experiments.train --config=configs/moving_digits.py:sana_video,denoise

The first argument is as in configs/digits.py. The encoder tells the digit's direction, which no
single frame shows; further arguments: digit to tell the digit; two for two digits; denoise for a
denoiser in place of the encoder.
"""

from configs import common, digits
from experiments.data import default_config


def get_config(arg: str = digits.DEFAULT):
    name, argument = digits.split_argument(arg)
    config = digits.get_config(name)
    config.data = default_config("moving_digits")
    config.data.update({"batch_size": 32, "label": "direction"})
    if name == "mlp":
        config.data.update({"patch_frames": 8, "patch": 16})
    config.train.update({"steps": 1000, "log_every": 100, "eval_every": 500})
    config.checkpoint.update({"every": 500, "keep": 1})
    return common.with_argument(config, argument, digit=_digit, two=_two, denoise=_denoise)


def _digit(config):
    config.data.label = "digit"


def _two(config):
    config.data.digits = 2


def _denoise(config):
    config.data.task = "denoising"
    config.model.architecture = "denoiser"
    config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 0.0})
    config.train.steps = 3000
