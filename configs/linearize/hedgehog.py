"""Hedgehog (arXiv 2402.04347): a learned feature map, distilled on attention's weights; then LoRA.

    python -m experiments.linearize --config=configs/linearize/hedgehog.py:smollm

Arguments: elu_plus_one, t2r: another feature map in its place; map: distil the map, without LoRA;
  hybrid, smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config(
        "lolcats(window=None)",
        {
            "objective": "transfer",
            "train": r"mixer/[qk]_map/",
            "attention_map": 1.0,
            "learning_rate": 1e-2,
            "steps": 100,
        },
        {"lora": common.LORA_QKVO, "lora_alpha": 16.0, "learning_rate": 1e-3, "steps": 100},
    )

    def t2r(config):
        config.linearize.student = "lolcats(window=None, feature_map='t2r')"

    def elu_plus_one(config):
        config.linearize.student = "lolcats(window=None, feature_map='elu_plus_one')"
        del config.linearize.stages["stage_1"]  # nothing to learn in it

    def map_only(config):
        del config.linearize.stages["stage_2"]

    variants = {"t2r": t2r, "elu_plus_one": elu_plus_one, "map": map_only}
    return common.with_argument(config, arg, **variants)
