"""The layout of files of our own models, which holds any config.model: model_type "seqmodels".

    config.json   {"model_type": "seqmodels", "format": 1, "model": {config.model}, ...}
    tensors       "block_3.mixer.q.kernel": one layer's, whether the stack is scanned or not

A file can be read with other settings of scan_layers, remat and dtype than it was written with.
"""

import json
from typing import Any

from seqmodels import language_model
from seqmodels.checkpoints_io import conversion, rules
from seqmodels.checkpoints_io.architectures import Architecture, HFConfig

MODEL_TYPE = "seqmodels"
_FORMAT = 1


def _model_config(config: HFConfig) -> dict[str, Any]:
    config.require(format=_FORMAT)
    model = config.section("model").fields
    if not model:
        raise ValueError(f"{config.name} lacks 'model', the config.model of a seqmodels model")
    required = {"pattern": str, "num_layers": int, "vocab_size": int, "d_model": int}
    for field, kind in required.items():
        if type(model.get(field)) is not kind:
            raise ValueError(
                f"{config.name}: model.{field} is {model.get(field)!r}; it must be {kind.__name__}"
            )
    return dict(model)


def _hf_config(model: dict[str, Any], specs) -> dict[str, Any]:
    fields = {k: v for k, v in model.items() if k not in ("dtype", "param_dtype")}
    try:
        fields = json.loads(json.dumps(fields))
    except TypeError as error:
        raise ValueError(f"config.model holds what JSON cannot: {error}") from error
    return {"format": _FORMAT, "model": fields, "vocab_size": model["vocab_size"]}


def _rules(model: dict[str, Any], specs):
    for path in conversion.Slots(language_model.from_config(model)).paths:
        yield rules.same(path.replace("/", "."), path)


ARCHITECTURE = Architecture(
    MODEL_TYPE, "LanguageModel", _model_config, _hf_config, _rules, ignored=(), base_prefix=""
)
