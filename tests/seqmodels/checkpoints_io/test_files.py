import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from seqmodels.checkpoints_io import files

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(3, dtype=np.int64),
    "half": np.ones((1,), np.float16),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16),
    "byte": np.arange(3, dtype=np.uint8),
    "nothing": np.zeros((0, 4), np.float32),
    "number": np.asarray(3.0, np.float32),
}


def entries(arrays):
    return {name: files.TensorEntry(array.shape, array.dtype) for name, array in arrays.items()}


def write(folder, arrays=ARRAYS, **options):
    return files.write(folder, entries(arrays), arrays.__getitem__, **options)


def check_equal(source, arrays=ARRAYS):
    assert source.entries == entries(arrays)
    for name, array in arrays.items():
        found = source.read(name)
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes() and found.shape == array.shape


def test_what_is_written_is_read(tmp_path):
    (path,) = write(tmp_path)
    assert path.name == "model.safetensors"
    check_equal(files.open_folder(tmp_path))


def test_a_file_is_byte_for_byte_the_librarys(tmp_path):
    arrays = ARRAYS | {"eight": np.arange(3).astype(ml_dtypes.float8_e4m3fn), "\u00e9": ARRAYS["b"]}
    files.write_file(tmp_path / "ours", entries(arrays), arrays.__getitem__)
    save_file(arrays, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_numpy_has_no_dtype_for_is_listed_and_not_read(tmp_path):
    arrays = {"w": np.arange(3).astype(ml_dtypes.float8_e4m3fn)}
    source = files.open_folder(write(tmp_path, arrays)[0].parent)
    assert source.entries == entries(arrays)
    with pytest.raises(ValueError, match="model.safetensors: tensor 'w' is float8_e4m3fn"):
        source.read("w")


def test_shards_and_their_index(tmp_path):
    write(tmp_path)
    paths = write(tmp_path, max_shard_bytes=24)
    assert [p.name for p in paths[:2]] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)]
    assert not (tmp_path / files.SINGLE_FILE).exists()
    index = json.loads((tmp_path / files.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    check_equal(files.open_folder(tmp_path))
    write(tmp_path)  # whole again: the shards are gone
    assert [p.name for p in tmp_path.iterdir()] == [files.SINGLE_FILE]


def test_one_tensor_is_asked_for_at_a_time_and_a_failure_leaves_nothing(tmp_path):
    def read(name):
        if name == "half":
            raise RuntimeError("the disk")
        return ARRAYS[name]

    with pytest.raises(RuntimeError, match="the disk"):
        files.write(tmp_path, entries(ARRAYS), read)
    assert not list(tmp_path.iterdir())
    for options in ({}, {"max_shard_bytes": 24}):  # what was there before stays, too
        before = write(tmp_path, **options)
        for failing in ({}, {"max_shard_bytes": 24}):
            with pytest.raises(RuntimeError, match="the disk"):
                files.write(tmp_path, entries(ARRAYS), read, **failing)
            assert sorted(tmp_path.iterdir()) == sorted(before)
            check_equal(files.open_folder(tmp_path))


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# The fault, as the library or we say it, and a file that has it.
HOSTILE = {
    "header too small": b"abc",
    "header too large": b"\xff" * 8 + b"{}",
    "invalid JSON in header: expected ident": raw(b'{"a": nonsense}'),
    "invalid JSON in header: invalid type": raw(b"[" * 100_000),
    "expected struct": raw(b"[1, 2]"),
    "missing field `shape`": raw({"w": {"dtype": "F32"}}),
    "unknown variant `F99`": raw({"w": tensor("F99")}, bytes(8)),
    "'w' has dtype F4; known are BOOL": raw({"w": tensor("F4", (4,), (0, 2))}, bytes(2)),
    "integer `-2`, expected usize": raw({"w": tensor(shape=[-2])}, bytes(8)),
    "invalid shape, data type, or offset": raw({"w": tensor(offsets=[0, 4])}, bytes(8)),
    "integer `-8`, expected usize": raw({"w": tensor(offsets=[-8, 0])}, bytes(8)),
    "invalid offset for tensor": raw({"w": tensor(), "v": tensor(offsets=[4, 12])}, bytes(12)),
    "offset for tensor `v`": raw({"w": tensor(), "v": tensor(offsets=[12, 20])}, bytes(20)),
    "cut off .* file not fully covered": raw({"w": tensor()}, bytes(7)),
    "file not fully covered": raw({"w": tensor()}, bytes(9)),
    "overflow computing buffer size": raw({"w": tensor(shape=[2**31, 2**31])}, bytes(8)),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_files(message, tmp_path):
    path = tmp_path / files.SINGLE_FILE
    path.write_bytes(HOSTILE[message])
    with pytest.raises(ValueError, match=message) as error:
        files.open_folder(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "shard", ["../w.safetensors", "/etc/passwd", "a/b", "..", "", 7, "a\\b", "w.safetensors\n"]
)
def test_an_index_cannot_leave_its_folder(shard, tmp_path):
    (tmp_path / files.INDEX_FILE).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValueError, match="a file name in the same folder"):
        files.open_folder(tmp_path)


def test_a_missing_shard_and_a_tensor_that_is_not_in_its_shard(tmp_path):
    paths = write(tmp_path, max_shard_bytes=24)
    index = json.loads((tmp_path / files.INDEX_FILE).read_text())
    index["weight_map"]["elsewhere"] = paths[0].name
    (tmp_path / files.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no tensor 'elsewhere' in .*00001-of-00003"):
        files.open_folder(tmp_path)
    paths[1].unlink()
    with pytest.raises(ValueError, match="names model-00002-of-00003.safetensors, which is not"):
        files.open_folder(tmp_path)


def test_what_the_index_does_not_name_in_a_shard_is_none_of_the_model(tmp_path):
    """A tensor that no name leads to, and one that the index has in another file."""
    paths = write(tmp_path, max_shard_bytes=24)
    index = json.loads((tmp_path / files.INDEX_FILE).read_text())
    mapped = index["weight_map"]
    name = next(tensor for tensor, shard in mapped.items() if shard == paths[2].name)
    del mapped[name]
    (tmp_path / files.INDEX_FILE).write_text(json.dumps(index))
    check_equal(files.open_folder(tmp_path), {k: v for k, v in ARRAYS.items() if k in mapped})
    mapped[name] = "again.safetensors"
    again = {name: ARRAYS[name] * 0}
    files.write_file(tmp_path / mapped[name], entries(again), again.__getitem__)
    (tmp_path / files.INDEX_FILE).write_text(json.dumps(index))
    check_equal(files.open_folder(tmp_path), ARRAYS | again)


def test_a_folder_without_weights_and_one_with_pickles(tmp_path):
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        files.open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        files.open_folder(tmp_path)


def test_any_cut_and_any_flipped_byte_of_the_header_is_noticed_or_harmless(tmp_path):
    """A file that opens after a change still reads within itself, and says what its header says."""
    path = tmp_path / "w.safetensors"
    files.write_file(path, entries(ARRAYS), ARRAYS.__getitem__)
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(0)
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="w.safetensors"):
            files.SafetensorsFile(path)
    rejected = 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in random.integers(0, header_end, random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        path.write_bytes(changed)
        try:
            source = files.SafetensorsFile(path)
        except ValueError as error:
            assert "w.safetensors" in str(error)
            rejected += 1
            continue
        assert all(source.read(name).shape == e.shape for name, e in source.entries.items())
    assert rejected > 150
