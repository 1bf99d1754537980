"""safetensors, read and written one tensor at a time: a file, or shards with an index.

A file is eight bytes that say how long the header is, a JSON header (name: dtype, shape, where its
bytes lie), and the bytes (https://github.com/huggingface/safetensors#format). Nothing in it is
executed. Every size and offset is checked when it is opened, so that reading cannot leave the file;
whatever is wrong raises ValueError that names the file and the fault.

A *source* of tensors is anything with `name`, for messages, `entries`, name to `Entry`, and
`read(name)`, a NumPy array.
"""

import contextlib
import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100_000_000  # what the format's own library allows

# In the order that the format's own writer lays tensors out in, last first.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that a source holds."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Tensors by name, read one by one."""

    name: str
    entries: Mapping[str, Entry]

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """One safetensors file, its header checked. The file may be changed by nobody while it is read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = str(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            header, self._data_start = _read_header(file, size, self.name)
        header.pop("__metadata__", None)
        self.entries: dict[str, Entry] = {}
        self._begin: dict[str, int] = {}
        for name, value in header.items():
            self.entries[name], self._begin[name] = _entry(name, value, self.name)
        self._check_layout(size - self._data_start)

    def _check_layout(self, data_bytes: int) -> None:
        end = 0
        for name in sorted(self._begin, key=lambda n: (self._begin[n], self.entries[n].num_bytes)):
            if self._begin[name] != end:
                fault = "overlaps the one before" if self._begin[name] < end else "leaves a gap"
                raise ValueError(
                    f"{self.name}: tensor {name!r} {fault}: it begins at byte {self._begin[name]}, not {end}"
                )
            end += self.entries[name].num_bytes
        if end != data_bytes:
            fault = "it is cut off" if data_bytes < end else "bytes follow its last tensor"
            raise ValueError(f"{self.name} holds {data_bytes} bytes of tensors, not {end}: {fault}")

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        with self.path.open("rb") as file:
            file.seek(self._data_start + self._begin[name])
            read = file.readinto(array.reshape(-1).view(np.uint8)) if array.size else 0
        if read != entry.num_bytes:
            raise ValueError(f"{self.name}: tensor {name!r} is cut off")
        return array


class ShardedFiles:
    """The tensors that an index file names in its safetensors files, as one source. What else lies
    in them is none of the model."""

    def __init__(self, index: str | Path):
        index = Path(index)
        self.name = str(index)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f'{index}: "weight_map" must map tensor names to file names')
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
                raise ValueError(
                    f"{index}: the file of tensor {name!r} is {shard!r}; it must be a file name in the same folder"
                )
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
            raise ValueError(f"{index} names {', '.join(missing)}, which is not there")
        opened = {shard: SafetensorsFile(index.parent / shard) for shard in shards}
        self._file_of = {name: opened[shard] for name, shard in weight_map.items()}
        for name, file in self._file_of.items():
            if name not in file.entries:
                raise ValueError(f"{index}: there is no tensor {name!r} in {file.name}")
        self.entries = {name: file.entries[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> np.ndarray:
        return self._file_of[name].read(name)


def open_folder(folder: str | Path) -> Source:
    """The tensors of a folder: model.safetensors, or, as other programs have it where that is not
    there, the shards of an index."""
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsFile(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return ShardedFiles(folder / INDEX_FILE)
    pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
    reason = f": {pickled[0]} is a pickle, which could run anything" if pickled else ""
    raise ValueError(f"{folder} holds no {SINGLE_FILE} or {INDEX_FILE}{reason}")


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises ValueError, naming the file, if it holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return _json_object(path.read_bytes(), str(path))


def write(
    folder: str | Path,
    entries: Mapping[str, Entry],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes tensors to `folder`, asking `read` for one at a time. Returns the files' paths.

    One model.safetensors, or shards of at most `max_shard_bytes` (a larger tensor has one to
    itself) and their index. Files get their names when all are whole; only then is what an earlier
    call left in the folder removed, so that a failure leaves the folder as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        held = sum(e.num_bytes for e in shards[-1].values())
        if shards[-1] and held + entry.num_bytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = entry
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [SINGLE_FILE] if count == 1 else names
    with contextlib.ExitStack() as undo:
        for name, shard in zip(names, shards):
            undo.callback(_temporary(folder / name).unlink, missing_ok=True)
            write_file(_temporary(folder / name), shard, read)
        for stale in [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE_FILE]:
            stale.unlink(missing_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        paths = [_temporary(folder / name).replace(folder / name) for name in names]
    if count == 1:
        return paths
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    total = sum(entry.num_bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [*paths, folder / INDEX_FILE]


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_file(path: Path, entries: Mapping[str, Entry], read: Callable) -> None:
    """Writes one safetensors file, byte for byte as the format's own library does."""
    rank = {name: i for i, name in enumerate(_DTYPES)}
    order = sorted(entries, key=lambda n: (-rank[_dtype_name(entries[n].dtype)], n))
    header: dict = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        entry = entries[name]
        offsets = [begin, begin + entry.num_bytes]
        header[name] = {
            "dtype": _dtype_name(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        begin = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.asarray(read(name), order="C")
            if array.shape != entries[name].shape or array.dtype != entries[name].dtype:
                raise ValueError(
                    f"tensor {name!r} is {array.dtype}{list(array.shape)}, announced as {entries[name]}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)


def _dtype_name(dtype: np.dtype) -> str:
    if np.dtype(dtype) not in _DTYPE_NAMES:
        raise ValueError(f"safetensors has no dtype {dtype}; it has {', '.join(_DTYPES)}")
    return _DTYPE_NAMES[np.dtype(dtype)]


def _read_header(file, size: int, name: str) -> tuple[dict, int]:
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"{name} is no safetensors file: it has {size} bytes")
    length = struct.unpack("<Q", start)[0]
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(
            f"{name} is cut off or no safetensors file: it announces a header of {length} bytes and has {size} in all"
        )
    return _json_object(file.read(length), f"{name}: its header"), 8 + length


def _json_object(data: bytes, what: str) -> dict:
    def unique(pairs):
        object_ = dict(pairs)
        if len(object_) < len(pairs):
            raise ValueError("a name stands in it twice")
        return object_

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object; it is {type(value).__name__}")
    return value


def _entry(name: str, value, file: str) -> tuple[Entry, int]:
    """A tensor's entry of the header, and where its bytes begin."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{file}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(_DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > 32:
        raise ValueError(f"{file}: tensor {name!r} has shape {shape!r}; it must be a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{file}: tensor {name!r} has data_offsets {offsets!r}; they must be [begin, end]"
        )
    entry = Entry(tuple(shape), _DTYPES[dtype])
    if offsets[1] - offsets[0] != entry.num_bytes:
        raise ValueError(
            f"{file}: tensor {name!r}, {dtype} {shape}, takes {entry.num_bytes} bytes, "
            f"and data_offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return entry, offsets[0]


def _are_sizes(value) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
