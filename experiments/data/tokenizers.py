"""Bytes, or a Hugging Face `tokenizers` file, behind one small interface.

A tokenizer has
  vocab_size       ids lie in [0, vocab_size)
  document_id      stands before every document; it is an input, never a target
  num_bytes_W      bytes of text that each id stands for (0 for special ids): bits per byte is
                   sum(loss) / ln 2 / sum(num_bytes_W[targets]) over the counted targets
  encode(text)     str or bytes to int32 ids, without document_id
  encode_document(data)   bytes to int32 ids, document_id first
  decode(ids)      ids to str; special ids vanish, broken UTF-8 becomes U+FFFD
"""

import pathlib
import re
from typing import Protocol

import numpy as np

BYTES = "bytes"


class Tokenizer(Protocol):
    vocab_size: int
    document_id: int
    num_bytes_W: np.ndarray

    def encode(self, text: str | bytes) -> np.ndarray: ...

    def encode_document(self, data: bytes) -> np.ndarray: ...

    def decode(self, ids) -> str: ...


class ByteTokenizer:
    """Ids 0-255 are the bytes themselves, 256 stands before each document. Any data is legal."""

    vocab_size = 257
    document_id = 256

    def __init__(self):
        self.num_bytes_W = np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_document(self, data: bytes) -> np.ndarray:
        ids = np.empty(len(data) + 1, np.int32)
        ids[0] = self.document_id
        ids[1:] = np.frombuffer(data, np.uint8)
        return ids

    def decode_bytes(self, ids) -> bytes:
        return bytes(int(i) for i in np.asarray(ids).reshape(-1) if i < 256)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    document_token: the token of the file that stands before each document (such as
      "<|endoftext|>"); "" adds an id of its own after the file's vocabulary.
    """

    def __init__(self, path: str, document_token: str = ""):
        import tokenizers  # a compiled library that runs on bytes need not load

        if not pathlib.Path(path).expanduser().is_file():
            raise FileNotFoundError(
                f"No tokenizer file {path!r}. Give the path of a tokenizer.json, or {BYTES!r}."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(path).expanduser()))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{path!r} is not a Hugging Face tokenizers file (tokenizer.json): {error}"
            ) from error
        self._path = path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        # Some files leave holes in their ids, so the size is the largest id and one.
        self.vocab_size = max(ids.values()) + 1
        if document_token and document_token not in ids:
            raise ValueError(
                f"document_token {document_token!r} is not in the vocabulary of {path!r}. "
                'Name one of its tokens, or leave it "" to add an id.'
            )
        self.document_id = ids[document_token] if document_token else self.vocab_size
        self.vocab_size += not document_token
        special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self.num_bytes_W = np.zeros(self.vocab_size, np.int32)
        byte_level = '"ByteLevel"' in self._tokenizer.to_str()
        for token, i in ids.items():
            if i not in special and i != self.document_id:
                self.num_bytes_W[i] = _num_bytes(token, byte_level)

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"A document is not UTF-8 ({error.reason} at byte {error.start}, it begins "
                    f"{text[:40]!r}), and {self._path!r} reads only UTF-8. Convert the file or use "
                    f"tokenizer={BYTES!r}."
                ) from error
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_document(self, data: bytes) -> np.ndarray:
        return np.append(np.int32(self.document_id), self.encode(data))

    def decode(self, ids) -> str:
        ids = [int(i) for i in np.asarray(ids).reshape(-1) if i != self.document_id]
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _num_bytes(token: str, byte_level: bool) -> int:
    """Bytes of text behind a vocabulary entry.

    Byte-level vocabularies spell each byte as one character. Others spell text, with U+2581 for a
    space (SentencePiece), a leading ## that is not text (WordPiece) and <0x0A> for a raw byte.
    """
    if byte_level:
        return len(token)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode())


def bytes_as_file() -> str:
    """A tokenizer.json of the ByteTokenizer's ids, for programs that read nothing else; document_id is "<|endoftext|>"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # Byte-level files spell a byte that is no visible character of Latin-1 as one of those that follow there.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in visible)
    letter = {b: b for b in visible} | {b: 256 + n for n, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({chr(letter[b]): b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    start = ("<|endoftext|>", ByteTokenizer.document_id)
    tokenizer.add_special_tokens([start[0]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start[0], "$A"], special_tokens=[start]
    )
    return tokenizer.to_str()


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a model of `vocab_size` tokens has the tokenizer's ids, but for a few that it never learned.

    Tokenizers of pretrained models get a token or two that the embedding lacks: a tenth, or 256, is allowed for. Such an
    id is refused where it comes up.
    """
    spare = max(vocab_size // 10, 256)
    return tokenizer.vocab_size <= vocab_size + spare and tokenizer.document_id < vocab_size


def make_tokenizer(name: str, document_token: str = "") -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    if name == BYTES:
        if document_token:
            raise ValueError(
                f"document_token {document_token!r} needs a tokenizer file, not bytes."
            )
        return ByteTokenizer()
    if not name:
        raise ValueError(f"tokenizer is empty: give {BYTES!r} or the path of a tokenizer.json.")
    return FileTokenizer(name, document_token)
