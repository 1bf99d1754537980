"""Gated DeltaNet students by layer-wise distillation, like InfiniteVL's language layers.

(arXiv 2512.08829.) New, random mixers learn the outputs of the teacher's layers, then all of them
its distribution of tokens, at temperature 2.

    python -m experiments.linearize --config=configs/linearize/gated_delta_net.py:smollm

Of every four layers the first stays softmax, as published. Arguments: all converts it as well;
smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config(
        "gated_delta_net(expand_v=2.0)",
        {
            "objective": "transfer",
            "train": "student/mixer/",
            "block": 1000.0,
            "learning_rate": 2e-3,
            "steps": 120,
        },
        {
            "train": "/mixer/",
            "ce": 0.0,
            "kl": 1.0,
            "temperature": 2.0,
            "learning_rate": 2e-4,
            "steps": 80,
        },
        keep_every=4,
        keep="first",
    )

    def convert_all(config):
        config.linearize.keep_every = 0

    return common.with_argument(config, arg, all=convert_all)
