"""LoLCATs (arXiv 2410.10254): softmax within a window, learned linear attention before it.

The linear part uses Hedgehog's feature map, and both parts share one denominator. Attention
transfer, then LoRA.

    python -m experiments.linearize --config=configs/linearize/lolcats.py:smollm

Arguments: no_transfer leaves the first stage out (the paper's ablation); hybrid, smollm, gpu, tiny:
  configs/linearize/common.py.
"""

from configs.linearize import common

TRANSFER = {
    "objective": "transfer",
    "train": r"mixer/([qk]_map/|factor$)",
    "heads": 1000.0,
    "learning_rate": 1e-2,
    "steps": 100,
}
ADAPT = {"lora": common.LORA_QKVO, "lora_alpha": 16.0, "learning_rate": 1e-3, "steps": 100}


def get_config(arg: str = ""):
    stages = [TRANSFER, ADAPT]
    if "no_transfer" in arg.split(","):
        stages = [ADAPT | {"steps": 200}]
    config = common.get_config("lolcats(window=64)", *stages)
    return common.with_argument(config, arg, no_transfer=lambda config: None)
