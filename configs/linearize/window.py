"""Baseline of all linearizations with a window: softmax attention within 64 tokens, and LoRA.

    python -m experiments.linearize --config=configs/linearize/window.py:smollm

Arguments: softmax has no window either: the teacher with adapters, which shows what training on
  this text is worth by itself; hybrid, smollm, gpu, tiny: configs/linearize/common.py.
"""

from configs.linearize import common


def get_config(arg: str = ""):
    config = common.get_config("attention(window=64)", {"lora": common.LORA_QKV, "steps": 200})

    def softmax(config):
        config.linearize.student = "attention"

    return common.with_argument(config, arg, softmax=softmax)
