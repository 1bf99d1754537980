r"""Gated DeltaNet 1.3B: 21 layers, width 2048, 6 heads of 256 keys and 512 values.

(Yang, Kautz & Hatamizadeh, arXiv 2412.06464, the budget of table 1.)

    python -m experiments.train --config=configs/gated_delta_net_1300m.py \
        --config.mesh.data=1 --config.mesh.fsdp=-1 \
        --config.data.paths=/data/fineweb --config.data.tokenizer=/data/tokenizer.json

100 billion tokens in batches of half a million, context 4096; `:hybrid` puts windowed attention in
every fourth layer. Hardware: 32 chips of v5p or 32 GPUs of 80 GB, parameters and optimizer sharded
over `fsdp`. Not run to the end here; tests run its `:smoke` cut.
"""

from configs import common
from experiments.data import default_config

MIXER = "gated_delta_net(num_heads=6, head_dim=256, expand_v=2.0)"


def get_config(arg: str = ""):
    config = common.get_config()
    config.data = default_config("text")
    config.data.update({"seq_len": 4096, "batch_size": 128})
    config.model.update(
        {
            "vocab_size": 32_000,
            "d_model": 2048,
            "num_layers": 21,
            "pattern": MIXER,
            "tied_embeddings": False,
            "remat": "full",
            "dtype": "bfloat16",
        }
    )
    config.optimizer.learning_rate = 4e-4
    config.schedule.warmup_steps = 2000
    config.train.update({"steps": 190_735, "eval_every": 2000, "eval_batches": 32})
    config.checkpoint.every = 2000
    return common.with_argument(config, arg, hybrid=_hybrid)


def _hybrid(config):
    config.model.pattern = f"3*{MIXER} + attention(num_heads=16, window=2048)"
