"""Makes `python_stdlib`, the source of the running Python's standard library, a TFDS dataset.

It is a corpus of about 12 MB that every machine with Python has, written once as array_record into
a cache folder and read through `tfds.data_source`, both without TensorFlow. Tests and installed
packages, in which distributions differ, are left out; a hash of its relative path puts each other
file into train, validation or test, 90/5/5.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
import sysconfig
import tempfile

import tensorflow_datasets as tfds

from experiments.data import batches, splits, tfds_source
from kernels_pallas.dispatch import verification

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = "_sysconfigdata"  # records how this Python was built on this machine


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """TFDS dataset of Python files, an example per file: `path` and `text` (the file's bytes).

    root: the folder whose .py files are read; None is this Python's standard library. A `path` is
      relative to it, with slashes.
    """

    VERSION = tfds.core.Version("1.0.0")
    name = "python_stdlib"

    def __init__(self, *, root: str | None = None, **kwargs):
        self._root = pathlib.Path(root or stdlib_root())
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        files = {split: [] for split in batches.SPLITS}
        for path in source_files(self._root):
            files[splits.split_of(path)].append(path)
        return {split: self._generate_examples(paths) for split, paths in files.items()}

    def _generate_examples(self, paths):
        for number, path in enumerate(paths):
            yield number, {"path": path, "text": (self._root / path).read_bytes()}


def stdlib_root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def source_files(root: pathlib.Path) -> list[str]:
    """Returns the sorted relative paths of the .py files below `root` that the corpus has."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        sources = [name for name in names if name.endswith(".py") and GENERATED not in name]
        found += [os.path.join(folder, name) for name in sources]
    paths = [pathlib.Path(name) for name in found if os.path.getsize(name)]
    return sorted(path.relative_to(root).as_posix() for path in paths)


def stdlib_documents(split: str, data_dir: str = ""):
    """Returns the documents of a split of python_stdlib, building the dataset if it is missing.

    data_dir: the folder it is built in; "" is kernels_pallas' cache folder.
    """
    batches.check_split(split)
    folder = pathlib.Path(data_dir).expanduser() if data_dir else verification.cache_folder()
    builder = build(folder)
    return tfds_source.Texts(builder.as_data_source(split=split), "text")


def build(data_dir: pathlib.Path, root: pathlib.Path | None = None) -> PythonStdlib:
    """Returns the python_stdlib dataset, built below `data_dir` if it is missing.

    root: the folder of sources; None is this Python's standard library.

    Its folder below `data_dir` is named by the Python version and a hash of the files' names and
    sizes, so another Python, or a patched one, gets its own. Each process builds in a temporary
    folder and renames it: of several at once one wins, and no half-written dataset shows.
    """
    root = stdlib_root() if root is None else pathlib.Path(root)
    paths = source_files(root)
    if not paths:
        raise ValueError(f"Empty corpus: no .py files below {root}; use data.name='text' instead.")
    listing = "\n".join(f"{path} {os.path.getsize(root / path)}" for path in paths)
    tag = hashlib.sha256(listing.encode()).hexdigest()[:8]
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    home = data_dir / f"python_{version}_{tag}"

    def builder_in(folder) -> PythonStdlib:
        return PythonStdlib(root=str(root), data_dir=str(folder), file_format="array_record")

    target = pathlib.Path(builder_in(home).data_path)
    if not target.exists():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            own = tempfile.mkdtemp(prefix="building_", dir=data_dir)
        except OSError as error:
            raise OSError(
                f"Cannot write the python_stdlib dataset to {data_dir} ({error.strerror}): set "
                "config.data.data_dir to a folder that can be written."
            ) from error
        try:
            builder = builder_in(own)
            with tfds_source.quiet():
                builder.download_and_prepare()
            target.parent.mkdir(parents=True, exist_ok=True)
            # Fails where another process was first, which wrote the same.
            with contextlib.suppress(OSError):
                os.rename(builder.data_path, target)
            if not target.exists():
                raise OSError(f"Could not move the finished python_stdlib dataset to {target}.")
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return builder_in(home)
