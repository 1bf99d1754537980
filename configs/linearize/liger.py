"""Liger (arXiv 2503.01496): gated linear attention with softmax's weights, beside a window of 64.

One stage of LoRA trains it.

    python -m experiments.linearize --config=configs/linearize/liger.py:smollm

Arguments: gla (the default), hgrn2, scalar: the kind of gate. The paper's ablations: ungated;
  random_gate: the gate of a new projection; no_window: linear attention alone; feature_map: a
  learned, ungated map (T2R's) in the place of the softmax over channels. hybrid, smollm, gpu, tiny:
  configs/linearize/common.py.
"""

from configs.linearize import common

STUDENTS = {
    "gla": "liger(window=64)",
    "hgrn2": "liger(window=64, gate='hgrn2')",
    "scalar": "liger(window=64, gate='scalar')",
    "ungated": "liger(window=64, gate='none')",
    "random_gate": "liger(window=64, gate_source='projection')",
    "no_window": "liger(window=None)",
    "feature_map": "liger(window=64, gate='none', feature_map='t2r')",
}


def get_config(arg: str = ""):
    config = common.get_config(
        STUDENTS["gla"],
        {"lora": common.LORA_QKV, "lora_rank": 8, "lora_alpha": 8.0, "steps": 200},
    )
    return common.with_argument(config, arg, **{name: _student(name) for name in STUDENTS})


def _student(name):
    def change(config):
        config.linearize.student = STUDENTS[name]
        stage = config.linearize.stages.stage_1
        if name == "feature_map":
            stage.train = r"mixer/[qk]_map/"
        if name == "random_gate":
            stage.train = r"mixer/gate/"

    return change
