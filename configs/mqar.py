"""Multi-query associative recall (Zoology, arXiv 2312.04927): recall values by their keys.

    python -m experiments.train --config=configs/mqar.py:delta_net
    python -m experiments.train --config=configs/mqar.py:linear_attention,pairs8

Arguments: a mixer (attention, delta_net, gated_delta_net, linear_attention); pairs8 for 128 tokens
  and 8 pairs in place of 64 and 4; full_vocabulary for the paper's 8192 tokens in place of 512,
  which two cores train on in minutes. docs/results.md has each mixer's accuracy.
"""

from configs import common
from experiments.data import default_config

VARIANTS = {
    "attention": "attention(num_heads=1)",
    "delta_net": "delta_net(num_heads=2, head_dim=32)",
    "gated_delta_net": "gated_delta_net(num_heads=2, head_dim=32, expand_v=1.0)",
    "linear_attention": "linear_attention(num_heads=2)",
}


def get_config(arg: str = "delta_net"):
    config = common.get_config()
    config.data = default_config("mqar")
    config.data.update({"batch_size": 64, "eval_examples": 1024, "vocab_size": 512})
    config.model.update({"d_model": 64, "num_layers": 2, "pattern": VARIANTS["delta_net"]})
    config.optimizer.update({"learning_rate": 1e-2, "weight_decay": 0.1})
    config.train.update({"steps": 1500, "log_every": 100, "eval_every": 250, "eval_batches": 4})
    config.checkpoint.every = 500

    def mixer(pattern):
        return lambda config: config.model.update({"pattern": pattern})

    variants = {name: mixer(pattern) for name, pattern in VARIANTS.items()}
    return common.with_argument(
        config, arg, **variants, pairs8=_pairs8, full_vocabulary=_full_vocabulary
    )


def _pairs8(config):
    # Easier examples among them, as the paper's authors train, are where softmax finds its heads.
    config.data.update({"seq_len": 128, "num_pairs": 8, "min_pairs": 1})
    config.optimizer.learning_rate = 5e-3  # at 1e-2 Gated DeltaNet stays at 0.98
    config.train.steps = 2500  # attention's heads form between steps 600 and 1000


def _full_vocabulary(config):
    config.data.vocab_size = 8192
