"""mmMamba (arXiv 2502.13145): Mamba-2's recurrence seeded from softmax attention.

Stages 1 and 2 train layer by layer, first the new parameters, then q, k and v too; stage 3 trains
end to end on the teacher's distribution of tokens.

    python -m experiments.linearize --config=configs/linearize/mmmamba.py:smollm

Arguments: scratch: q, k, v and o are taken over, the rest is random; mamba_in_llama: Mamba-2 itself
  with x, B, C from v, k, q (arXiv 2408.15237), trained whole in stages 1 and 2; hybrid keeps the
  first of every four layers; smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common

NEW = r"student/mixer/(dt|decay|g|o_norm|[qkv]_conv)/"
LAYER = {"objective": "transfer", "mixer": 1000.0, "clip": 5.0, "weight_decay": 0.05}


def get_config(arg: str = ""):
    config = common.get_config(
        "mmmamba(seed='mimic')",
        LAYER | {"train": NEW, "learning_rate": 1e-3, "steps": 80},
        LAYER | {"train": rf"{NEW}|student/mixer/[qkv]/", "learning_rate": 5e-4, "steps": 80},
        {
            "train": "/mixer/",
            "ce": 0.0,
            "kl": 1.0,
            "learning_rate": 5e-5,
            "clip": 5.0,
            "weight_decay": 0.05,
            "steps": 40,
        },
        keep="first",
    )
    config.schedule.name = "wsd"

    def scratch(config):
        config.linearize.student = "mmmamba(seed='scratch')"

    def mamba_in_llama(config):
        config.linearize.student = "mamba2"
        for name in ("stage_1", "stage_2"):
            config.linearize.stages[name].train = "student/mixer/"

    return common.with_argument(config, arg, scratch=scratch, mamba_in_llama=mamba_in_llama)
