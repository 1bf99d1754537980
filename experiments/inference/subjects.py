"""What `experiments.evaluate` scores: a run or a pretrained model, on the mesh of a config."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import seqmodels
from configs import common
from experiments.data import default_config, make_dataset
from experiments.inference import pretrained
from experiments.launch import distributed
from experiments.training import restore, steps
from seqmodels import sharding
from seqmodels.loading import LoadedModel

Dataset = Any
ReadSplit = Callable[[Any], Dataset]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to score.

    config: a run's, or one that a pretrained model's fields came into. params: as `program` has
    them; `loaded` holds the same. step: of a run. loaded: None where the run's data is not text.
    dataset: of a split, if one is scored.
    """

    name: str
    config: Any
    program: steps.Program
    params: Any
    loaded: LoadedModel | None
    dataset: Dataset | None = None
    step: int | None = None


def new_config(data: str):
    """Returns the config that a pretrained model's fields come into, to score it on this data."""
    config = common.get_config()
    config.data = default_config(data)
    config.data.tokenizer = ""  # the model's
    return config


def of_run(config, workdir: str, read: ReadSplit | None, *, step: int | None = None) -> Subject:
    """Returns a run's checkpoint, the latest if `step` is None, and what `read` makes of config."""
    config = restore.reading_config(config)
    dataset = read and read(config)
    program = steps.build(config, _row_length(config, dataset))
    step, params = restore.evaluation_params(program, config, Path(workdir), step)
    of_text = "tokenizer" in config.data
    loaded = pretrained.on_mesh(config, params, workdir) if of_text else None
    return Subject(f"{workdir}, step {step}", config, program, params, loaded, dataset, step)


def of_source(config, source: str, read: ReadSplit | None, **options) -> Subject:
    """Returns what `seqmodels.load` finds with these options; its fields are put into `config`."""
    loaded = seqmodels.load(source, config.data.tokenizer, **options)
    config.model = dict(loaded.config)
    own = {"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token}
    config.data.update(own)
    dataset = read and read(config)
    length = _row_length(config, dataset)
    if dataset is None:
        length = min(length, loaded.model.learned_positions or length)
    program = steps.build(config, length)
    shapes = program.abstract_state.params
    params = jax.tree.map(lambda p, shape: jax.device_put(p, shape.sharding), loaded.params, shapes)
    found = dataclasses.replace(loaded.found, params=params)
    loaded = dataclasses.replace(loaded, found=found)
    return Subject(source, config, program, params, loaded, dataset)


def read_split(config, split: str) -> Dataset:
    """Returns this process's share of a split of config.data.

    Raises ValueError where the data has more ids than the model.
    """
    mesh = sharding.make_mesh(config.mesh)
    share = distributed.data_share(sharding.batch_sharding(mesh))
    dataset = make_dataset(config.data, split, process_index=share.index, process_count=share.count)
    if dataset.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the data has ids up to {dataset.vocab_size - 1}, and the model a vocabulary of {config.model.vocab_size}: score it "
            "with the tokenizer that it was trained with"
        )
    return dataset


def _row_length(config, dataset: Dataset | None) -> int:
    if dataset is None:
        return config.data.get("seq_len", 8)
    return next(iter(dataset))["inputs"].shape[1]
