"""Reads datasets of TensorFlow Datasets through `tfds.data_source`, without TensorFlow.

Datasets have to be stored as array_record; missing ones are prepared so. (Preparing some datasets
needs TensorFlow, for their own parsing; reading them does not.)
"""

import contextlib
import fcntl
import io
import pathlib

import tensorflow_datasets as tfds


class Texts:
    """Sequence of the bytes of one text feature, `key`, of a `tfds` data source."""

    def __init__(self, source, key: str):
        self.source, self.key = source, key

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.source[i][self.key]


@contextlib.contextmanager
def quiet():
    """Context manager: silences the bars and prints that TFDS makes while it prepares a dataset."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def prepare(builder) -> None:
    """Downloads a TFDS builder's dataset and writes it to disk, unless it is there.

    Of processes that share a disk one does it and the others wait; to a bucket (gs://) all write
    the same.
    """
    if builder.data_path.exists():
        return
    if "://" in str(builder.data_path):
        builder.download_and_prepare()
        return
    folder = pathlib.Path(builder.data_path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".preparing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not builder.data_path.exists():
            builder.download_and_prepare()


def open_builder(name: str, data_dir: str = ""):
    """Returns the builder of a TFDS dataset, `name` such as "wiki40b/en:1.3.0"; nothing is read.

    data_dir: "" is TFDS's own default.
    Raises ValueError for an unknown dataset.
    """
    if not name:
        raise ValueError("config.data.tfds_name is empty: give the name of a TFDS dataset.")
    where = {"data_dir": data_dir} if data_dir else {}
    try:
        return tfds.builder(name, file_format="array_record", **where)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"Unknown TFDS dataset {name!r}: {error}") from error


def check_feature(builder, name: str, key: str, kind: type, option: str) -> None:
    """Raises ValueError, listing the choices, if a dataset has no feature `key` of this kind.

    kind: a class of tfds.features. option: the config's option that chose the feature.
    """
    known = [k for k, value in builder.info.features.items() if isinstance(value, kind)]
    if key not in known:
        what = kind.__name__.lower()
        raise ValueError(
            f"TFDS dataset {name!r} has no {what} feature {key!r}; its {what} features are "
            f"{', '.join(known) or 'none'} (set config.data.{option})."
        )


def read_split(builder, name: str, split: str, **options):
    """Returns the data source of a split, which is prepared first where it is missing.

    split: in TFDS's notation, such as "train[:1%]". options: of the builder's `as_data_source`.
    Raises ValueError for an unknown split, or a dataset stored in another format.
    """
    prepare(builder)
    base = split.split("[")[0]
    if base not in builder.info.splits:
        raise ValueError(
            f"TFDS dataset {name!r} has no split {base!r}; it has "
            f"{', '.join(builder.info.splits)} (set config.data.train_split and its like, "
            'for instance to "train[95%:]").'
        )
    try:
        return builder.as_data_source(split=split, **options)
    except NotImplementedError as error:
        raise ValueError(
            f"TFDS dataset {name!r} in {builder.data_path} is not stored as array_record: {error}"
        ) from error


def tfds_documents(name: str, split: str, *, text_key: str = "text", data_dir: str = "") -> Texts:
    """Returns the documents of a TFDS dataset.

    text_key: the feature that holds the text. name, data_dir, split: as in `open_builder` and
      `read_split`, whose errors it raises.
    """
    builder = open_builder(name, data_dir)
    check_feature(builder, name, text_key, tfds.features.Text, "text_key")
    return Texts(read_split(builder, name, split), text_key)
