"""Reads the user's own text files as random-access documents.

A document is a file or, with documents="lines", a line. Long documents are cut, where possible at
a line's end, into documents of about `document_bytes`: memory holds no more at once, and rows of a
batch start at different places of one big file. All but the last of these are a `Piece`.
"""

import glob
import mmap
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from experiments.data import batches, splits

MANY_FILES = 100  # with fewer each file is cut into splits; else whole files go to a split
DOCUMENTS = ("files", "lines")


class Piece(bytes):
    """Bytes of a document that goes on in the next one: its end is not a label."""


class TextFiles:
    """Sequence of documents that are parts of files: `[i]` reads one as bytes, or as a Piece.

    names: file names.
    file_N, start_N, stop_N: of each document its file's index, first byte and stop.
    ends_N: whether the document ends at its stop; else it was cut there, and is a Piece.
    """

    def __init__(self, names, file_N, start_N, stop_N, ends_N):
        self.names, self.file_N, self.start_N, self.stop_N = names, file_N, start_N, stop_N
        self.ends_N = ends_N

    def __len__(self):
        return len(self.file_N)

    def __getitem__(self, i):
        name = self.names[self.file_N[i]]
        start, stop = int(self.start_N[i]), int(self.stop_N[i])
        with open(name, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) < stop - start:
            raise OSError(f"{name} was {stop} bytes long when the run began and is shorter now.")
        return data if self.ends_N[i] else Piece(data)


def text_documents(
    paths: str | Sequence[str],
    split: str,
    *,
    held_out_paths: dict[str, str | Sequence[str]] | None = None,
    documents: str = "files",
    document_bytes: int = 1 << 14,
) -> TextFiles:
    """Returns the documents of one split of text files.

    paths: files, folders (every file below, hidden ones left out) and globs; a sequence, or one
      string with commas between them.
    held_out_paths: paths of "validation" and "test". With any of these given all of `paths` is for
      training, and a split without paths raises ValueError. Without them 90, 5 and 5 % go to train,
      validation and test: from 100 files on by a hash of each file's name (relative to its folder),
      else by cutting every file by position.
    documents: "files" or "lines", what counts as a document.
    document_bytes: about where longer documents are cut.
    """
    batches.check_split(split)
    if documents not in DOCUMENTS:
        raise ValueError(
            f"Unknown documents={documents!r}; the choices are {', '.join(DOCUMENTS)}."
        )
    given = {"train": paths} | {s: p for s, p in (held_out_paths or {}).items() if p}
    if len(given) > 1 and split not in given:
        raise ValueError(
            f"There is no {split} text: paths_{split} is empty while "
            f"{', '.join('paths_' + s for s in given if s != 'train')} is given. Give paths_{split} "
            "too, or neither, to have `paths` split 90/5/5."
        )
    files = find_files(given.get(split, paths))
    share = (0.0, 1.0)
    if len(given) == 1 and len(files) >= MANY_FILES:
        files = [(path, name) for path, name in files if splits.split_of(name) == split]
    elif len(given) == 1:
        share = splits.share_of(split)
    parts = [_documents(path, share, documents == "lines", document_bytes) for path, _ in files]
    counts = [len(starts) for starts, *_ in parts]
    if not sum(counts):
        raise ValueError(
            f"Empty corpus: the {split} split of {_list(paths)} ({len(files)} files) has no text."
        )
    return TextFiles(
        [path for path, _ in files],
        np.repeat(np.arange(len(files), dtype=np.int32), counts),
        *map(np.concatenate, zip(*parts)),
    )


def find_files(paths: str | Sequence[str]) -> list[tuple[str, str]]:
    """Returns (path, name) of every file that `paths` stand for, sorted; missing ones raise."""
    patterns = _list(paths)
    if not patterns:
        raise ValueError("No text files: set config.data.paths to files, folders or globs.")
    found = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            root = pathlib.Path(path)
            below = [f.relative_to(root) for f in root.rglob("*") if f.is_file()]
            visible = [f for f in below if not any(part.startswith(".") for part in f.parts)]
            matches = [(str(root / f), f.as_posix()) for f in visible]
        elif os.path.isfile(path):
            matches = [(path, os.path.basename(path))]
        else:
            hits = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
            matches = [(f, os.path.basename(f)) for f in hits]
        if not matches:
            raise FileNotFoundError(
                f"config.data.paths: {pattern!r} is no file, and no folder or glob with files in it "
                f"(looked from {os.getcwd()})."
            )
        found.update(matches)
    return sorted(found.items())


def _list(paths) -> list[str]:
    parts = paths.split(",") if isinstance(paths, str) else paths
    return [part.strip() for part in parts if part.strip()]


def _documents(path: str, share, lines: bool, document_bytes: int):
    """Returns start and stop bytes of a file's documents, and whether each stop ends the document.

    share: the interval of the file's length to read, within [0, 1].
    """
    size = os.path.getsize(path)
    none = np.zeros(0, np.int64)
    if size == 0:
        return none, none, none
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Neighbouring splits find their common border by the same call, so nothing is lost.
        first, last = (_cut(data, int(size * part), int(size * (part + 0.02))) for part in share)
        if lines:
            starts, stops = _lines(data, first, last)
            return starts, stops, (stops < last) | (stops == size)
        cuts = [first]
        while last - cuts[-1] > document_bytes:
            cuts.append(
                min(_cut(data, cuts[-1] + document_bytes, cuts[-1] + 2 * document_bytes), last)
            )
        cuts = np.asarray(cuts + [last] * (last > cuts[-1]), np.int64)
    return cuts[:-1], cuts[1:], cuts[1:] == size


_CHARACTER_START = re.compile(rb"[^\x80-\xbf]")  # in UTF-8
_LINE_END = re.compile(rb"\r?\n")


def _cut(data: mmap.mmap, at: int, limit: int) -> int:
    """Returns the first offset in [at, limit) after a newline, else between UTF-8 characters."""
    if at == 0 or at >= len(data):
        return min(at, len(data))
    newline = data.find(b"\n", at - 1, limit)
    if newline >= 0:
        return newline + 1
    start = _CHARACTER_START.search(data, at, min(at + 4, len(data)))
    return start.start() if start else at


def _lines(data: mmap.mmap, first: int, last: int):
    """Returns first and stop bytes of the lines that are not empty, without their line ends."""
    starts, stops, start = [], [], first
    for match in _LINE_END.finditer(data, first, last):
        starts.append(start)
        stops.append(match.start())
        start = match.end()
    starts, stops = np.asarray(starts + [start], np.int64), np.asarray(stops + [last], np.int64)
    return starts[stops > starts], stops[stops > starts]
