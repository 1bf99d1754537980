"""Makes datasets of packed text, tasks and images through Grain, resumable, sharded by process.

    dataset = make_dataset(config.data, "train")     # "validation", "test": one pass
    for batch in dataset: ...                        # see batches.Dataset

`default_config(name)` returns the options of a dataset with these defaults; `make_dataset` takes a
ConfigDict or a dict, fills in missing options and rejects unknown ones.

Every dataset
  name             python_stdlib, text, tfds, or a task (below)
  batch_size=16    rows of a global batch, shared equally by processes; may change in a resumed run
  eval_batch_size=0   the same for validation and test; 0 is batch_size
  seed=0           order of the training documents, or the examples of a task
  prefetch=2       batches read ahead on a thread; 0 reads in the caller's thread

Text (python_stdlib, text, tfds)
  seq_len=512      T: length of a packed row
  tokenizer="bytes"   or the path of a Hugging Face tokenizer.json
  document_token=""   of a tokenizer file: the token before each document, which is also the label
                   of each document's last token; "" adds an id
python_stdlib      the source of this Python's standard library (stdlib_corpus.py)
  data_dir=""      where it is kept; "" is $SEQMODELS_CACHE or ~/.cache/seqmodels
text               files of your own (text.py)
  paths=""         files, folders, globs, with commas between them
  paths_validation="", paths_test=""   held-out files; both empty: `paths` is split 90/5/5
  documents="files"   or "lines": what counts as a document
  document_bytes=0    longer documents are cut there; 0 is max(16384, 8 seq_len)
tfds               any TFDS dataset stored as array_record (tfds_source.py)
  tfds_name=""     such as "wiki40b/en"
  text_key="text"  the feature that holds the text
  data_dir=""      "" is TFDS's own
  train_split="train", validation_split="validation", test_split="test"   in TFDS's notation

Tasks (tasks/): mqar, parity, modular_arithmetic, word_problem, selective_copying
  num_examples=0   training examples, repeated in a new order each epoch; 0 never repeats one
  eval_examples=1024   validation and test examples
  and the fields of the task's dataclass; a field eval_x other than 0 replaces x outside of training

Images (vision/; the extra [vision]): digits, digit_pixels, moving_digits, digit_points, images
  pack=1           images per row, each a document of its own
  and the fields of the dataset's dataclass, among them, of all but digit_pixels,
  task="classification"   or "denoising"
  label_dropout=0.1   of denoising: the share of training images whose class is hidden
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.data import batches, packing, tasks, text, vision
from experiments.data.batches import SPLITS, Dataset
from seqmodels.text.tokenizers import make_tokenizer

__all__ = [
    "DATASETS",
    "SPLITS",
    "Dataset",
    "default_config",
    "documents",
    "make_dataset",
]

_COMMON = {"batch_size": 16, "eval_batch_size": 0, "seed": 0, "prefetch": 2}
_TEXT = {"seq_len": 512, "tokenizer": "bytes", "document_token": ""}
_TEXTS = {
    "python_stdlib": {"data_dir": ""},
    "text": dict.fromkeys(("paths", "paths_validation", "paths_test"), "")
    | {"documents": "files", "document_bytes": 0},
    "tfds": {"tfds_name": "", "text_key": "text", "data_dir": ""}
    | {f"{split}_split": split for split in SPLITS},
}
_TASK = {"num_examples": 0, "eval_examples": 1024}

DATASETS = (*_TEXTS, *tasks.TASKS, *vision.DATASETS)


def default_config(name: str) -> ConfigDict:
    """Returns the `data` section of a config for one dataset: every option with its default."""
    if name not in DATASETS:
        raise ValueError(
            f"Unknown dataset {name!r}{_hint(name, DATASETS)}; the choices are {', '.join(DATASETS)}."
        )
    if name in _TEXTS:
        own = _TEXT | _TEXTS[name]
    elif name in vision.DATASETS:
        own = vision.options(name)
    else:
        own = _TASK | tasks.options(name)
    return ConfigDict({"name": name} | _COMMON | own)


def make_dataset(
    config: Mapping[str, Any], split: str, *, process_index: int = 0, process_count: int = 1
) -> Dataset:
    """Returns one split of the dataset that `config` (a config's `data` section) describes.

    The global batch does not depend on the number of processes. Of its rows this process gets the
    process_index-th of process_count equal, contiguous slices.

    Raises ValueError for an unknown dataset, option or split.
    """
    config = _filled(config)
    batches.check_split(split)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {config.seed}.")
    train = split == "train"
    batch_size = config.batch_size if train else config.eval_batch_size or config.batch_size
    rows = batches.process_rows(batch_size, process_index, process_count)
    if config.name in vision.DATASETS:
        made = vision.make(config.name, **{key: config[key] for key in vision.options(config.name)})
        examples = made.read(split)
        pipeline = vision.example_batches(
            examples, split, pack=made.pack, seed=config.seed, batch_size=batch_size, rows=rows
        )
        about = {"vocab_size": 0, "tokenizer": None} | examples.about
    elif config.name in tasks.TASKS:
        given = {key: config[key] for key in tasks.options(config.name)}
        task = tasks.make_task(config.name, split, **given)
        pipeline = tasks.task_batches(
            task,
            split,
            seed=config.seed,
            num_examples=config.num_examples if train else config.eval_examples,
            batch_size=batch_size,
            rows=rows,
        )
        about = {"vocab_size": task.vocab_size, "tokenizer": None, "chance": task.chance}
    else:
        tokenizer = make_tokenizer(config.tokenizer, config.document_token)
        pipeline = packing.packed_batches(
            documents(config, split),
            tokenizer,
            seq_len=config.seq_len,
            batch_size=batch_size,
            rows=rows,
            train=train,
            seed=config.seed,
            what=f"the {split} split of {config.name}",
        )
        about = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer}
    return Dataset(batches=batches.Prefetched(pipeline, config.prefetch), **about)


def documents(config: Mapping[str, Any], split: str):
    """Returns a text dataset's documents in a split: a sequence with a bytes object for each."""
    config = _filled(config)
    batches.check_split(split)
    # TFDS takes seconds to import, and only two of the datasets need it.
    if config.name == "python_stdlib":
        from experiments.data import stdlib_corpus

        return stdlib_corpus.stdlib_documents(split, config.data_dir)
    if config.name == "tfds":
        from experiments.data import tfds_source

        return tfds_source.tfds_documents(
            config.tfds_name,
            config[f"{split}_split"],
            text_key=config.text_key,
            data_dir=config.data_dir,
        )
    if config.name == "text":
        if config.document_bytes < 0:
            raise ValueError(
                f"document_bytes is {config.document_bytes}; it must be at least 1, or 0 for max(16384, 8 seq_len)"
            )
        return text.text_documents(
            config.paths,
            split,
            held_out_paths={"validation": config.paths_validation, "test": config.paths_test},
            documents=config.documents,
            document_bytes=config.document_bytes or max(1 << 14, 8 * config.seq_len),
        )
    what = "of images" if config.name in vision.DATASETS else "a synthetic task"
    raise ValueError(f"Dataset {config.name!r} is {what} and has no documents.")


def _filled(config: Mapping[str, Any]) -> ConfigDict:
    """Returns the `data` section with missing options at their defaults; unknown ones raise."""
    if "name" not in config:
        raise ValueError(f"data.name is missing; the choices are {', '.join(DATASETS)}.")
    filled = default_config(config["name"])
    for key, value in config.items():
        if key not in filled:
            raise ValueError(
                f"Dataset {config['name']!r} has no option {key!r}{_hint(key, filled)}; the choices "
                f"are {', '.join(filled)}."
            )
        # Several paths may come as a list, from Python, or as one string, from a flag.
        filled[key] = ",".join(value) if isinstance(value, (list, tuple)) else value
    return filled


def _hint(name: str, choices) -> str:
    close = difflib.get_close_matches(name, list(choices), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
