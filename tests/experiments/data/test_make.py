"""make_dataset: names, options and shares that do not exist are refused before anything is read."""

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from experiments.data import DATASETS, default_config, documents, make_dataset


def test_an_unknown_dataset_lists_the_choices():
    for call in (default_config, lambda name: make_dataset({"name": name}, "train")):
        with pytest.raises(
            ValueError, match="'partiy' .did you mean 'parity'.*python_stdlib.*mqar"
        ):
            call("partiy")
    with pytest.raises(ValueError, match="data.name is missing"):
        make_dataset({}, "train")


def test_an_unknown_option_lists_the_choices():
    with pytest.raises(ValueError, match="no option 'seqlen' .did you mean 'seq_len'.*batch_size"):
        make_dataset({"name": "text", "seqlen": 4}, "train")


def test_an_unknown_split_lists_the_choices():
    with pytest.raises(ValueError, match="'valid'; the choices are train, validation, test"):
        make_dataset({"name": "parity"}, "valid")


def test_a_batch_must_divide_over_the_processes():
    with pytest.raises(
        ValueError, match="6 does not divide over 4 processes; take a multiple of 4"
    ):
        make_dataset({"name": "parity", "batch_size": 6}, "train", process_count=4)
    with pytest.raises(ValueError, match="process_index 2 is not in"):
        make_dataset({"name": "parity", "batch_size": 6}, "train", process_index=2, process_count=2)
    with pytest.raises(ValueError, match="prefetch must be 0 or more"):
        make_dataset({"name": "parity", "prefetch": -1}, "train")
    with pytest.raises(ValueError, match="seed must be in"):
        make_dataset({"name": "parity", "seed": -1}, "train")


@pytest.mark.parametrize("name", DATASETS)
def test_default_config(name):
    config = default_config(name)
    assert isinstance(config, ConfigDict) and config.name == name
    assert {"batch_size", "eval_batch_size", "seed", "prefetch"} <= set(config)
    assert all(isinstance(value, (str, int, float, bool)) for value in config.values())


def test_configs_of_any_kind_and_paths_as_a_list(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    with pytest.raises(ValueError, match="synthetic task and has no documents"):
        documents(FrozenConfigDict(default_config("mqar")), "train")
    config = {"name": "text", "paths": [f"{tmp_path}/a.txt"], "seq_len": 8, "batch_size": 2}
    assert next(iter(make_dataset(config, "train")))["inputs"].shape == (2, 8)
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        make_dataset(config | {"seq_len": 0}, "train")
