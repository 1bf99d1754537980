r"""Selective transfer: a learnable mix per layer decides which layers become linear.

LinVideo's idea (arXiv 2510.08318), applied to a language model. Hedgehog's feature map is
distilled; then map, LoRA adapters and mix are trained while a penalty drives every mix to 0 or 1,
and select_target of them to 1.

    python -m experiments.linearize --config=configs/linearize/selective.py:smollm \
        --config.linearize.stages.stage_2.select_target=15

Arguments: smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config(
        "selective(mix_init=0.9)",
        {
            "objective": "transfer",
            "train": r"mixer/[qk]_map/",
            "attention_map": 1.0,
            "learning_rate": 1e-2,
            "steps": 60,
        },
        {
            "train": r"mixer/([qk]_map/|mix_logit$)",
            "lora": common.LORA_QKVO,
            "lora_alpha": 16.0,
            "ce": 0.0,
            "kl": 1.0,
            "select_weight": 0.01,
            "select_target": 2,
            "learning_rate": 1e-2,
            "steps": 100,
        },
    )
    return common.with_argument(config, arg)
