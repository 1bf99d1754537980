"""Loads what `experiments.evaluate` scores: a run or a pretrained model, on a config's mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import seqmodels
from configs import common
from experiments.data import default_config, make_dataset
from experiments.inference import pretrained
from experiments.launch import cli, distributed
from experiments.training import restore, run_record, steps
from seqmodels import sharding
from seqmodels.loading import LoadedModel

TEXTS = ["python_stdlib", "text", "tfds"]  # what a pretrained model can be scored on


@dataclasses.dataclass(frozen=True)
class Subject:
    """Fields of a model to score, and of the data to score it on.

    name: for tables and messages.
    config: a run's; for a pretrained model one that was filled with its fields.
    program: jitted functions of the model on the config's mesh.
    params: parameters in the layout of `program`.
    loaded: the same model with its tokenizer; None where the run's data is not text.
    dataset: this process's share of the split to score; None where no split is scored.
    step: of a run's checkpoint; None for a pretrained model.
    """

    name: str
    config: ConfigDict
    program: steps.Program
    params: Any
    loaded: LoadedModel | None
    dataset: Any = None
    step: int | None = None


def config_of(flag: Callable[[str], str | None]) -> ConfigDict:
    """Returns the config to score with: that of --workdir's run or, with --model, one for its data.

    flag: function from a flag's name to its text or None.
    """
    if not flag("model"):
        return run_record.load_config(flag("workdir") or "")
    if flag("workdir"):
        raise cli.UserError("give --workdir or --model, not both")
    config = common.get_config()
    config.data = default_config(flag("data") or TEXTS[0])
    config.data.tokenizer = ""  # the model's
    return config


def is_language_model(config) -> bool:
    """Returns whether a config's model is a language model, no encoder or denoiser of images."""
    return config.model.get("architecture", "language_model") == "language_model"


def of_run(
    config, workdir: str, split: str | None, step: int | None = None, asked: Sequence[str] = ()
) -> Subject:
    """Returns a run's checkpoint as a Subject, with the dataset of `split`, if one is given.

    step: which checkpoint; None is the latest.
    asked: names of the flags given that need a language model. Raises UserError if there is one and
      the run's data is not text.
    """
    of_text = "tokenizer" in config.data
    if asked and not of_text:
        raise cli.UserError(
            f"the run's data, {config.data.name!r}, is not text: --{asked[0]} needs a language "
            "model"
        )
    config = restore.reading_config(config)
    dataset, length = _dataset(config, split)
    program = steps.build(config, length)
    step, params = restore.evaluation_params(program, config, Path(workdir), step)
    loaded = pretrained.on_mesh(config, params, workdir) if of_text else None
    return Subject(f"{workdir}, step {step}", config, program, params, loaded, dataset, step)


def of_source(config, source: str, split: str | None, **options) -> Subject:
    """Returns a pretrained model as a Subject, with the dataset of `split`, if one is given.

    config: is changed in place to the model's fields and tokenizer.
    source, options: arguments of `seqmodels.load`.
    """
    loaded = seqmodels.load(source, config.data.tokenizer, **options)
    config.model = loaded.config
    own = {"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token}
    config.data.update(own)
    dataset, length = _dataset(config, split)
    if dataset is None:
        length = min(length, loaded.model.learned_positions or length)
    program = steps.build(config, length)
    shapes = program.abstract_state.params
    params = jax.tree.map(lambda p, shape: jax.device_put(p, shape.sharding), loaded.params, shapes)
    found = dataclasses.replace(loaded.found, params=params)
    loaded = dataclasses.replace(loaded, found=found)
    return Subject(source, config, program, params, loaded, dataset)


def read_split(config, split: str):
    """Returns this process's share of a split of config.data, as a Dataset.

    Raises ValueError where the data has token ids that the model lacks, or a model of images is
    for another grid, number of classes or width of patches.
    """
    share = distributed.data_share(sharding.batch_sharding(sharding.make_mesh(config.mesh)))
    dataset = make_dataset(config.data, split, process_index=share.index, process_count=share.count)
    if dataset.vocab_size > (config.model.get("vocab_size") or 0):
        raise ValueError(
            f"the data has ids up to {dataset.vocab_size - 1}, and the model a vocabulary of "
            f"{config.model.vocab_size}: score it with the tokenizer that it was trained with"
        )
    for name in ("grid", "input_dim", "num_classes"):
        theirs, own = getattr(dataset, name), config.model.get(name)
        if theirs and own and theirs != (tuple(own) if name == "grid" else own):
            hint = f": give --config.model.grid='{theirs}', too" if name == "grid" else ""
            raise ValueError(f"the data's {name} is {theirs}, and the model's {own}{hint}")
    return dataset


def _dataset(config, split: str | None):
    """Returns (the split's dataset or None, the row length in tokens)."""
    if split is None:
        return None, config.data.get("seq_len", 8)
    dataset = read_split(config, split)
    return dataset, next(iter(dataset))["inputs"].shape[1]
