"""Loads the model that a linearization starts from, and fits the config's data to it."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from seqmodels import checkpoints_io, language_model, loading, mixers
from seqmodels.text import tokenizers


def overrides(config) -> dict[str, Any]:
    """Returns the fields of config.model (remat, dtype) that replace the teacher's own."""
    return {name: config.model[name] for name in ("remat", "dtype")}


def load(source: str, overrides: dict[str, Any]) -> checkpoints_io.Pretrained:
    """Loads a teacher with float32 parameters.

    source: a run's folder (of `experiments.train`), a Hugging Face folder, `gguf:<file>` or a hub
      name.
    overrides: fields of config.model that replace the teacher's own, such as remat.
    """
    if not source:
        raise ValueError(
            "no teacher: set --config.linearize.teacher to a run's folder, a Hugging Face folder, or gguf:<file>"
        )
    found = loading.find(source, dtype="float32")
    return dataclasses.replace(found, model_config=dict(found.model_config) | overrides)


def with_data(config: ConfigDict, teacher: checkpoints_io.Pretrained) -> ConfigDict:
    """Returns a copy of the config with the teacher's tokenizer, unless the config names one.

    Another tokenizer that the config names is kept. Raises ValueError for data that is not text,
    where there is no tokenizer, or for one that does not fit the teacher's vocabulary.
    """
    config = config.copy_and_resolve_references()
    data = config.data
    if "tokenizer" not in data:
        raise ValueError(
            f"a linearization reads text; data.name is {data.name!r}: take python_stdlib, text or tfds"
        )
    name = "" if data.tokenizer == "teacher" else data.tokenizer
    brings_bytes = teacher.hf_config.get("tokenizer") == tokenizers.BYTES
    if not (name or brings_bytes or teacher.tokenizer_path):
        raise ValueError("the teacher brings no tokenizer: set --config.data.tokenizer")
    if data.document_token:
        own = teacher.hf_config | {"document_token": data.document_token}
        teacher = dataclasses.replace(teacher, hf_config=own)
    loaded = loading.with_tokenizer(teacher, name)
    data.update({"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token})
    return config


def check_context(model_config: dict[str, Any], seq_len: int) -> None:
    """Raises ValueError if `seq_len` exceeds the teacher's softmax context or learned positions."""
    model = language_model.from_config(model_config)
    limits = [
        (mixers.options(spec.name) | dict(spec.options)).get("max_length")
        for spec in model.mixers
        if spec.name == "attention" and dict(spec.options).get("window") is None
    ]
    shortest = min(filter(None, [*limits, model.learned_positions]), default=None)
    if shortest is not None and seq_len > shortest:
        raise ValueError(
            f"data.seq_len is {seq_len}, longer than the teacher's context of {shortest} tokens; shorten it, or set max_length in "
            "the teacher's pattern"
        )
