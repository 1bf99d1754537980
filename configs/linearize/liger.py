"""Liger (arXiv 2503.01496): a softmax layer's weights as gated linear attention beside a window of 64, adapted with LoRA alone.

    python -m experiments.linearize --config=configs/linearize/liger.py:smollm

Arguments: gla (the default), hgrn2, scalar: what the gate is; hybrid, smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config(
        "liger(window=64)",
        {"lora": common.LORA_QKV, "lora_rank": 8, "lora_alpha": 8.0, "steps": 200},
    )
    return common.with_argument(
        config, arg, **{gate: _gate(gate) for gate in ("gla", "hgrn2", "scalar")}
    )


def _gate(gate):
    def change(config):
        config.linearize.student = f"liger(window=64, gate={gate!r})"

    return change
