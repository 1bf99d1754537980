"""Reads the header of a GGUF file: its metadata, and where in the file each tensor lies.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. Counts and lengths are checked against the file's size before anything is read or
allocated. `gguf.GGUFReader` does not do that, and takes longer (docs/decisions).
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_NESTING = 2
_NUMBERS = {  # type number: NumPy's name
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Place of a tensor in a GGUF file; `kind` is GGML's number of its type, `begin` its offset."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata of a GGUF file and its tensors' places, by name.

    Values of metadata are Python's; arrays of numbers are NumPy's, other arrays are lists.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read(path: Path, block_sizes: dict[int, tuple[int, int]]) -> Header:
    """Reads the header of the GGUF file at `path`.

    block_sizes: {GGML's type number: (elements, bytes) of a block} (`gguf.GGML_QUANT_SIZES`).
    Raises ValueError, naming the file and the fault, for anything but a whole GGUF file.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, path.stat().st_size, str(path))
        if cursor.take(4, "the magic number") != _MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4), "little") in _VERSIONS
            found = "big-endian" if big else f"GGUF version {version}"
            raise ValueError(f"{path} is {found}; versions 2 and 3, little-endian, can be read")
        tensor_count, metadata_count = cursor.number("<u8"), cursor.number("<u8")
        cursor.check_count(metadata_count, 8 + 4 + 1, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.string("a metadata key")
            if key in metadata:
                raise ValueError(f"{path} has metadata {key!r} twice")
            metadata[key] = cursor.value(cursor.number("<u4"), key)
        cursor.check_count(tensor_count, 8 + 4 + 8 + 4 + 8, "tensors")
        infos = [_tensor(cursor, block_sizes) for _ in range(tensor_count)]
        tensors = _placed(infos, cursor, metadata.get("general.alignment", 32))
    return Header(metadata, tensors)


class _Cursor:
    """Reader of consecutive values of a file, which never reads beyond the file's end."""

    def __init__(self, file, size: int, name: str):
        self.file, self.size, self.name, self.at = file, size, name, 0

    def take(self, length: int, what: str) -> bytes:
        if length > self.size - self.at:
            raise ValueError(
                f"{self.name} is cut off: {what} should take {length} bytes at byte {self.at}, "
                f"and the file has {self.size}"
            )
        self.at += length
        return self.file.read(length)

    def number(self, kind: str) -> int:
        return int(self.numbers(kind, 1, "a number")[0])

    def numbers(self, kind: str, count: int, what: str) -> np.ndarray:
        data = self.take(count * np.dtype(kind).itemsize, what)
        if kind == "?" and any(byte > 1 for byte in data):
            raise ValueError(f"{self.name}: {what} is a truth value other than 0 and 1")
        return np.frombuffer(data, kind)

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self.at:
            raise ValueError(
                f"{self.name} announces {count} {what}, more than its {self.size} bytes can hold"
            )

    def string(self, what: str) -> str:
        # A quarter of a million tokens pass here: struct is quicker than NumPy on single numbers.
        length = struct.unpack("<Q", self.take(8, f"the length of {what}"))[0]
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: {what} is not UTF-8: {data[:20]!r}") from error

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        what = f"metadata {key!r}"
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], 1, what)[0].item()
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or nesting == _MAX_NESTING:
            fault = "too deep an array" if kind == _ARRAY else f"the unknown type {kind}"
            raise ValueError(f"{self.name}: {what} has {fault}")
        # An array: the type of its elements, their number, the elements.
        of, count = self.number("<u4"), self.number("<u8")
        if of in _NUMBERS:
            return self.numbers(_NUMBERS[of], count, what)
        self.check_count(count, 8, f"elements of {what}")
        return [self.value(of, key, nesting + 1) for _ in range(count)]


def _tensor(cursor: _Cursor, block_sizes) -> tuple[str, TensorInfo]:
    name = cursor.string("a tensor's name")
    dims = cursor.number("<u4")
    if not 1 <= dims <= _MAX_DIMS:
        raise ValueError(f"{cursor.name}: tensor {name!r} has {dims} axes; there may be 1 to 4")
    shape = tuple(cursor.number("<u8") for _ in range(dims))[::-1]
    kind, offset = cursor.number("<u4"), cursor.number("<u8")
    if kind not in block_sizes:
        raise ValueError(f"{cursor.name}: tensor {name!r} has the unknown type {kind}")
    elements, block_bytes = block_sizes[kind]
    if min(shape) < 1 or shape[-1] % elements:
        raise ValueError(
            f"{cursor.name}: tensor {name!r} of shape {list(shape)} is no whole number of blocks of {elements}"
        )
    num_bytes = math.prod(shape) // elements * block_bytes
    return name, TensorInfo(shape, kind, offset, num_bytes)


def _placed(infos, cursor: _Cursor, alignment) -> dict[str, TensorInfo]:
    """Returns `infos` by name, with offsets from the file's start in place of the data section's.

    cursor: at the header's end. Raises ValueError if tensors overlap or lie beyond the file's end.
    """
    name_of = cursor.name
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{name_of}: general.alignment is {alignment!r}; it must be a power of 2")
    start = -(-cursor.at // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    end = 0
    for name, info in sorted(infos, key=lambda pair: pair[1].begin):
        if name in placed:
            raise ValueError(f"{name_of} has tensor {name!r} twice")
        if info.begin % alignment:
            raise ValueError(
                f"{name_of}: tensor {name!r} begins at {info.begin}, no multiple of {alignment}"
            )
        if info.begin < end:
            raise ValueError(f"{name_of}: tensor {name!r} overlaps the one before it")
        end = info.begin + info.num_bytes
        if start + end > cursor.size:
            raise ValueError(
                f"{name_of} is cut off: tensor {name!r} ends at byte {start + end} of {cursor.size}"
            )
        placed[name] = dataclasses.replace(info, begin=start + info.begin)
    return placed
