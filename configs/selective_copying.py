"""Selective copying (Mamba, arXiv 2312.00752, section 4.1.1): repeat the tokens, skip the noise.

python -m experiments.train --config=configs/selective_copying.py
"""

from configs import common
from experiments.data import default_config


def get_config(arg: str = ""):
    config = common.get_config()
    config.data = default_config("selective_copying")
    config.data.update({"batch_size": 64})
    config.model.update({"d_model": 64, "num_layers": 4, "pattern": "mamba", "channel_mixer": None})
    config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 0.0})
    config.train.update({"steps": 2000, "log_every": 100, "eval_every": 500, "eval_batches": 4})
    return common.with_argument(config, arg)
