"""LAWCAT (arXiv 2509.18467): convolutions on q and k, and normalised gated linear attention.

The convolutions begin as identities, and no layer has a window. Layer-wise transfer, then LoRA.

    python -m experiments.linearize --config=configs/linearize/lawcat.py:smollm

Arguments: hybrid, smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config(
        "lawcat(conv_width=4, features=32)",
        {
            "objective": "transfer",
            "train": r"mixer/([qk]_map/|[qk]_conv/|gk_)",
            "heads": 1000.0,
            "learning_rate": 1e-2,
            "steps": 100,
        },
        {"lora": common.LORA_QKVO, "lora_alpha": 16.0, "learning_rate": 1e-3, "steps": 100},
    )
    return common.with_argument(config, arg)
