"""A small softmax transformer on bytes: the teacher of linearization tests and tables.

    python -m experiments.train --config=configs/linearize_teacher.py --workdir=runs/teacher

It needs no download.
"""

from configs import common
from experiments.data import default_config


def get_config(arg: str = ""):
    config = common.get_config()
    config.data = default_config("python_stdlib")
    config.data.update({"seq_len": 256, "batch_size": 8})
    config.model.update(
        {
            "d_model": 128,
            "num_layers": 4,
            "pattern": "attention(num_heads=4, num_kv_heads=2, max_length=2048)",
        }
    )
    config.optimizer.learning_rate = 3e-3
    config.schedule.update({"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.3})
    config.train.update({"steps": 1000, "log_every": 50, "eval_every": 500})
    config.checkpoint.every = 250
    config.sample.prompt = "def "
    return common.with_argument(config, arg)
