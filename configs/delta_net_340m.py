r"""DeltaNet 340M: 24 layers, width 1024, 8 heads of 128, vocabulary 32,000.

(Yang et al., arXiv 2406.06484; Siems et al., arXiv 2502.10297, appendix.)

    python -m experiments.train --config=configs/delta_net_340m.py \
        --config.data.paths=/data/fineweb --config.data.tokenizer=/data/tokenizer.json

15 billion tokens in batches of half a million, context 2048. Hardware: a v5p-8 or 8 GPUs of 80 GB.
Not run to the end here; tests run its `:smoke` cut and compile the whole model (`python -m
experiments.bench --op=compile`).
"""

from configs import common
from experiments.data import default_config


def get_config(arg: str = ""):
    config = common.get_config()
    config.data = default_config("text")
    config.data.update({"seq_len": 2048, "batch_size": 256})
    config.model.update(
        {
            "vocab_size": 32_000,
            "d_model": 1024,
            "num_layers": 24,
            "pattern": "delta_net(num_heads=8, head_dim=128)",
            "remat": "full",
            "dtype": "bfloat16",
        }
    )
    config.optimizer.learning_rate = 3e-4
    config.schedule.warmup_steps = 1000
    config.train.update({"steps": 28_610, "eval_every": 1000, "eval_batches": 32})
    config.checkpoint.every = 1000
    return common.with_argument(config, arg)
