"""The standard library as a TFDS dataset, any TFDS dataset, and the baselines; no TensorFlow."""

import gzip
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import (
    baselines,
    documents,
    make_dataset,
    stdlib_corpus,
    text,
    tfds_source,
)
from tests.experiments.data_helpers import split_bytes

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder that looks like a standard library, with what must be left out."""
    root = tmp_path_factory.mktemp("lib")
    for i in range(150):
        path = root / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"number = {i}\n" * (i + 1))
    (root / "package0" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9\n")
    (root / "package0" / "empty.py").write_text("")
    (root / "package0" / "notes.txt").write_text("no")
    (root / "_sysconfigdata__linux_x86_64-linux-gnu.py").write_text("no = 1")
    for left_out in ("site-packages/numpy", "test", "package1/tests"):
        (root / left_out).mkdir(parents=True)
        (root / left_out / "no.py").write_text("no = 1")
    return root


@pytest.fixture
def config(library, tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "stdlib_root", lambda: library)
    return {"name": "python_stdlib", "data_dir": str(tmp_path), "seq_len": 64, "batch_size": 4}


def test_the_splits_share_out_the_source_files(config, library):
    files = stdlib_corpus.source_files(library)
    assert len(files) == 151 and files == sorted(files)
    seen = []
    for split in ("train", "validation", "test"):
        source = documents(config, split)
        assert len(source) > 0
        texts = [source[i] for i in range(len(source))]
        assert b"".join(texts) == split_bytes(config, split)
        seen += texts
    assert sorted(seen) == sorted((library / f).read_bytes() for f in files)


def test_it_is_built_once_and_again_for_other_sources(config, library, tmp_path):
    documents(config, "train")
    (first,) = tmp_path.iterdir()
    stamp = {f: f.stat().st_mtime_ns for f in first.rglob("*.array_record*")}
    assert len(stamp) == 3
    documents(config, "test")
    assert stamp == {f: f.stat().st_mtime_ns for f in first.rglob("*.array_record*")}
    other = library / "package0" / "patched.py"
    other.write_text("x = 1\n")
    try:
        documents(config, "train")
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        other.unlink()


BUILD = """
import pathlib, sys
from experiments.data import stdlib_corpus
builder = stdlib_corpus.build(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
print(sum(len(builder.as_data_source(split=s)) for s in ("train", "validation", "test")))
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


@pytest.mark.slow
def test_two_processes_build_at_once_without_tensorflow(library, tmp_path):
    command = [sys.executable, "-c", BUILD, str(tmp_path), str(library)]
    running = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "151\n"), error
    assert [folder.name[:7] for folder in tmp_path.iterdir()] == ["python_"]


def test_where_nothing_can_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="set config.data.data_dir"):
        documents(config | {"data_dir": str(tmp_path / "file")}, "train")


def test_a_folder_without_sources(tmp_path):
    with pytest.raises(ValueError, match="Empty corpus: no .py files"):
        stdlib_corpus.build(tmp_path, tmp_path)


def test_batches_of_it(config):
    dataset = make_dataset(config, "validation")
    assert dataset.vocab_size == 257
    batches = list(dataset)
    labels = np.concatenate([b["labels"][b["loss_mask"] > 0] for b in batches])
    data = bytes(labels[labels < 256].astype(np.uint8))
    assert sorted(data.splitlines()) == sorted(split_bytes(config, "validation").splitlines())
    source = documents(config, "validation")
    assert (labels == 256).sum() == sum(len(source[i]) > 0 for i in range(len(source)))


def test_a_tfds_dataset_by_name(config, library, tmp_path):
    builder = stdlib_corpus.build(tmp_path, library)
    by_name = {
        "name": "tfds",
        "tfds_name": "python_stdlib",
        "data_dir": str(pathlib.Path(builder.data_path).parents[1]),
        "validation_split": "train[:10]",
    }
    assert split_bytes(by_name, "test") == split_bytes(config, "test")
    assert len(documents(by_name, "validation")) == 10
    next(iter(make_dataset(by_name, "train")))
    with pytest.raises(
        ValueError, match="no text feature 'body'; its text features are path, text"
    ):
        documents(by_name | {"text_key": "body"}, "train")
    with pytest.raises(ValueError, match="no split 'dev'; it has .*train"):
        documents(by_name | {"validation_split": "dev[:5]"}, "validation")
    with pytest.raises(ValueError, match="Unknown TFDS dataset 'no_such_set'"):
        documents(by_name | {"tfds_name": "no_such_set"}, "train")
    with pytest.raises(ValueError, match="tfds_name is empty"):
        documents({"name": "tfds"}, "train")


def test_a_text_feature_is_read_alone():
    assert tfds_source.Texts([{"a": b"1", "b": b"2"}], "b")[0] == b"2"


def test_gzip_baseline():
    data = b"the same again and again " * 40
    cut = text.Piece(b"c" * 90)
    assert baselines.gzip_bits_per_byte([cut]) == 8 * len(gzip.compress(b"c" * 90, 9)) / 90
    told = gzip.compress(
        data + b"\0and an end\0", 9
    )  # where documents end, in which bytes are counted
    result = baselines.gzip_bits_per_byte([data, b"", b"and an end"])
    assert result == 8 * len(told) / (len(data) + 10)
    with pytest.raises(ValueError, match="Empty corpus"):
        baselines.gzip_bits_per_byte([b""])


def test_bigram_baseline_by_hand():
    # Trained on "ab": END->a, a->b and b->END once each; held out "ab" and "b": three bytes, two
    # ends.
    seen, unseen = np.log2(2 / 258), np.log2(1 / 258)
    expected = -(4 * seen + unseen) / 3
    result = baselines.bigram_bits_per_byte([b"ab"], [b"ab", b"b", b""])
    np.testing.assert_allclose(result, expected)
    cut = baselines.bigram_bits_per_byte([b"ab"], [b"ab", text.Piece(b"b")])
    np.testing.assert_allclose(cut, -(3 * seen + unseen) / 3)
    untrained = baselines.bigram_bits_per_byte([], [b"anything"])
    np.testing.assert_allclose(untrained, np.log2(257) * 9 / 8)
    sure = baselines.bigram_bits_per_byte([b"abc", b"abc"], [b"abc"], smoothing=1e-9)
    np.testing.assert_allclose(sure, 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="Empty corpus"):
        baselines.bigram_bits_per_byte([b"a"], [])
