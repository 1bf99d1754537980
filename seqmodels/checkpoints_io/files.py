"""Reads and writes tensors in safetensors files, one at a time: a file, or shards with an index.

The `safetensors` library checks and reads files. We write them ourselves: the library takes
pointers to all tensors of a file at once, and so needs memory for a whole file (docs/decisions).
Nothing in a file is executed. Whatever is wrong with one raises a ValueError that names the file.
"""

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

# In the library's order of dtypes: a file holds the tensors of the last ones first.
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
_UNREADABLE = (_DTYPES["F8_E5M2"], _DTYPES["F8_E4M3"])
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorEntry(NamedTuple):
    """Shape and dtype of one tensor in a `Source`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Protocol of tensors that are read by name, one at a time; `name` is for error messages."""

    name: str

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """A safetensors file, checked when opened. It is memory-mapped, and must not be changed in
    place while it is read."""

    def __init__(self, path: str | Path):
        self.name = str(path)
        with self._errors_name_the_file():
            self._file = safe_open(path, framework="numpy")
            names = self._file.keys()
            slices = {name: self._file.get_slice(name) for name in names}
        self.entries: dict[str, TensorEntry] = {}
        for name, tensor in slices.items():
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{self.name}: tensor {name!r} has dtype {dtype}; known are {', '.join(_DTYPES)}"
                )
            self.entries[name] = TensorEntry(tuple(shape), _DTYPES[dtype])

    def read(self, name: str) -> np.ndarray:
        if self.entries[name].dtype in _UNREADABLE:
            raise ValueError(
                f"{self.name}: tensor {name!r} is {self.entries[name].dtype}, which safetensors "
                "does not read into NumPy"
            )
        with self._errors_name_the_file():
            return self._file.get_tensor(name)

    @contextlib.contextmanager
    def _errors_name_the_file(self):
        """Context manager: raises errors of the library as ValueErrors that name the file."""
        try:
            yield
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{self.name} is cut off or not a safetensors file: {error}"
            ) from error


class ShardedFiles:
    """Tensors that an index lists, in safetensors files beside it. Others there are ignored."""

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
    """Opens model.safetensors or an index's shards; raises ValueError if `folder` has neither."""
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsFile(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return ShardedFiles(folder / INDEX_FILE)
    pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
    reason = f": {pickled[0]} is a pickle, which could run anything" if pickled else ""
    raise ValueError(f"{folder} holds no {SINGLE_FILE} or {INDEX_FILE}{reason}")


def read_json(path: str | Path) -> dict:
    """Returns the JSON object in a file; raises ValueError, naming the file, if it has none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object; it is {type(value).__name__}")
    return value


def write(
    folder: str | Path,
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes tensors to `folder`: model.safetensors, or shards and an index; returns the paths.

    entries: shape and dtype of every tensor. read: a function from a name to that tensor.
    max_shard_bytes: the most that a shard holds; a larger tensor has a shard of its own.

    Files have temporary names until all are whole; then files of an earlier call are removed and
    the new ones renamed. So a failure leaves the folder as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Share tensors out in their order, a new shard where the next one would overflow.
    shards: list[dict[str, TensorEntry]] = [{}]
    for name, entry in entries.items():
        held = sum(e.num_bytes for e in shards[-1].values())
        if shards[-1] and held + entry.num_bytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = entry
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [SINGLE_FILE] if count == 1 else names
    # Write all shards under temporary names; when they are whole, replace what was there.
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


def write_file(path: Path, entries: Mapping[str, TensorEntry], read: Callable) -> None:
    """Writes one safetensors file, byte for byte as the library would, with one tensor in memory.

    A file is the length of its header (8 bytes), the header (JSON: dtype, shape and offsets of each
    tensor, padded to 8 bytes), and the tensors' bytes. `read` returns a tensor by name.
    """
    rank = {name: i for i, name in enumerate(_DTYPES)}
    order = sorted(entries, key=lambda n: (-rank[_dtype_name(entries[n].dtype)], n))
    header: dict = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        (shape, dtype), end = entries[name], begin + entries[name].num_bytes
        header[name] = {
            "dtype": _dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.asarray(read(name), order="C")
            if (array.shape, array.dtype) != entries[name]:
                raise ValueError(
                    f"tensor {name!r} is {array.dtype}{list(array.shape)}, announced as {entries[name]}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)


def _dtype_name(dtype: np.dtype) -> str:
    if np.dtype(dtype) not in _DTYPE_NAMES:
        raise ValueError(f"safetensors has no dtype {dtype}; it has {', '.join(_DTYPES)}")
    return _DTYPE_NAMES[np.dtype(dtype)]
