"""A small hybrid of Gated DeltaNet and windowed attention, on bytes of Python's standard library.

    python -m experiments.train --config=configs/quickstart.py

It takes minutes on two cores, from building the corpus to the loss curve; docs/results.md has the
figures.
"""

from configs import common
from experiments.data import default_config


def get_config(arg: str = ""):
    config = common.get_config()
    config.data = default_config("python_stdlib")
    config.data.seq_len = 256
    config.data.batch_size = 8
    config.model.update(
        {
            "d_model": 128,
            "num_layers": 4,
            "pattern": "3*gated_delta_net(num_heads=2, head_dim=32, expand_v=2.0)"
            " + attention(num_heads=4, window=128)",
        }
    )
    config.optimizer.learning_rate = 3e-3
    config.schedule.update({"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.3})
    config.train.update({"steps": 500, "log_every": 20, "eval_every": 250})
    config.sample.prompt = "def "
    return common.with_argument(config, arg)
