"""Synthetic tasks that need a state: parity, modular_arithmetic, word_problem.

(arXiv 2411.12537, 2502.10297.)

    python -m experiments.train --config=configs/state_tracking.py:parity,delta_net_negative
    python -m experiments.train --config=configs/state_tracking.py:word_problem,delta_product

The first argument is the task, the second a model: delta_net, delta_net_negative (eigenvalues in
[-1, 1]), mamba, mamba_negative, delta_product (two Householder factors per token), mlstm,
attention. Parity is trained on lengths 3 to 40 and tested on prefixes of 40 to 256; docs/results.md
has the accuracies.
"""

from configs import common
from experiments.data import default_config

VARIANTS = {
    "attention": "attention(num_heads=4)",
    "delta_net": "delta_net(num_heads=4)",
    "delta_net_negative": "delta_net(num_heads=4, allow_neg_eigval=True)",
    "delta_product": "delta_product(num_heads=4, num_householder=2, allow_neg_eigval=True)",
    "mamba": "mamba",
    "mamba_negative": "mamba(negative_eigenvalues=True)",
    "mlstm": "mlstm",
}


def get_config(arg: str = "parity,delta_net_negative"):
    task, _, argument = arg.partition(",")
    config = common.get_config()
    config.data = default_config(task)
    config.data.update({"batch_size": 64, "eval_batch_size": 32, "eval_examples": 512})
    if "supervise" in config.data:
        config.data.supervise = "all"  # every prefix has an answer: a denser signal
    config.model.update(
        {"d_model": 64, "num_layers": 2, "pattern": VARIANTS["delta_net_negative"], "d_ff": 128}
    )
    config.optimizer.update({"learning_rate": 1e-2, "weight_decay": 0.0})
    # Without it the loss of short lengths underflows at an eigenvalue of -0.98: longer ones forget.
    config.train.z_loss = 1e-3
    config.train.update({"steps": 1500, "log_every": 100, "eval_every": 250, "eval_batches": 4})
    config.checkpoint.every = 500

    def mixer(pattern):
        return lambda config: config.model.update({"pattern": pattern})

    return common.with_argument(
        config, argument, **{name: mixer(pattern) for name, pattern in VARIANTS.items()}
    )
