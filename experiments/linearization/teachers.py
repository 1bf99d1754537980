"""Loads the model that a linearization starts from, and fits the config's data to it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.data import make_dataset
from experiments.training import loop, restore, run_record, steps
from seqmodels import checkpoints_io, language_model, loading, mixers, models
from seqmodels.checkpoints_io import runs
from seqmodels.text import tokenizers


def overrides(config) -> dict[str, Any]:
    """Returns the fields of config.model (remat, dtype) that replace the teacher's own."""
    return {name: config.model[name] for name in ("remat", "dtype")}


def load(source: str, overrides: dict[str, Any]) -> checkpoints_io.Pretrained:
    """Loads a teacher with float32 parameters.

    source: a run's folder (of `experiments.train`), a Hugging Face folder, `gguf:<file>` or a hub
      name. Encoders and denoisers are runs.
    overrides: fields of config.model that replace the teacher's own, such as remat.
    """
    if not source:
        raise ValueError(
            "no teacher: set --config.linearize.teacher to a run's folder, a Hugging Face folder, or gguf:<file>"
        )
    if runs.is_run(source):
        config = run_record.load_config(source)
        if models.architecture_of(config.model) != "language_model":
            return _of_run(config, source, overrides)
    found = loading.find(source, dtype="float32")
    return dataclasses.replace(found, model_config=dict(found.model_config) | overrides)


def _of_run(config, source: str, overrides: dict[str, Any]) -> checkpoints_io.Pretrained:
    """Reads a run of any architecture onto one device; it brings no tokenizer."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(overrides)
        config.mesh = dict.fromkeys(config.mesh, 1)
    program = steps.build(config, row_length(config), jax.local_devices()[:1])
    if program.abstract_state.collections:
        raise ValueError(
            f"{source} has {', '.join(program.abstract_state.collections)} beside its parameters, "
            "which a conversion does not carry: take a teacher with other norms"
        )
    params = program.model_params(restore.evaluation_params(program, config, Path(source))[1])
    return checkpoints_io.Pretrained(config.model.to_dict(), params, {}, source)


def row_length(config) -> int:
    """Returns the number of tokens in a row of the config's data."""
    if "tokenizer" in config.data:
        return config.data.seq_len
    return next(iter(make_dataset(config.data, "validation")))["inputs"].shape[1]


def with_data(config: ConfigDict, teacher: checkpoints_io.Pretrained) -> ConfigDict:
    """Returns a copy of the config with the teacher's tokenizer, unless the config names one.

    Another tokenizer that the config names is kept. Teachers that bring no tokenizer may have data
    that is not text, of their own sizes. Raises ValueError for other data than the teacher's kind,
    where there is no tokenizer, or for one that does not fit the teacher's vocabulary.
    """
    config = config.copy_and_resolve_references()
    data = config.data
    architecture = models.architecture_of(teacher.model_config)
    if "tokenizer" not in data:
        if teacher.tokenizer_path or "tokenizer" in teacher.hf_config:
            raise ValueError(
                f"this teacher's linearization reads text; data.name is {data.name!r}: take "
                "python_stdlib, text or tfds"
            )
        given = ConfigDict({"model": teacher.model_config})
        loop.resolve(given, make_dataset(data, "validation"))  # raises where sizes differ
        return config
    if architecture != "language_model":
        raise ValueError(
            f"the teacher {teacher.source} is of architecture {architecture!r} and data.name is "
            f"{data.name!r}, text: set config.data to data that the teacher reads"
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
    model = models.from_config(model_config)
    if not isinstance(model, language_model.LanguageModel):
        return
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
