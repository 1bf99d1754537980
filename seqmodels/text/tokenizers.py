"""Tokenizers by bytes, or by a Hugging Face `tokenizers` file, with one small interface.

A tokenizer has
  vocab_size       ids lie in [0, vocab_size)
  document_id      the id before every document, which is also the label of its last token
  special_texts    id -> text of the ids that `decode` leaves out, document_id among them; only stop
                   strings are compared with it
  num_bytes_W      bytes that each id adds to the text before it. document_id, which is the label at
                   a document's end, subtracts what the tokenizer puts before a document: -1 for
                   SentencePiece's space, 0 for bytes. They add up to the text if the tokenizer
                   does not change it (`packing.document_tokens` corrects the rest)
  encode(text, special=False)   str or bytes to int32 ids, without document_id; special: with the
                   special tokens that a file puts around a text (for bytes, document_id first)
  decode(ids)      ids to str; broken UTF-8 becomes U+FFFD
"""

import pathlib
import re
from collections.abc import Callable
from typing import Protocol

import numpy as np

BYTES = "bytes"
_SPACE = "\u2581"  # SentencePiece's letter for a space


class Tokenizer(Protocol):
    vocab_size: int
    document_id: int
    special_texts: dict[int, str]
    num_bytes_W: np.ndarray

    def encode(self, text: str | bytes, special: bool = False) -> np.ndarray: ...

    def decode(self, ids) -> str: ...


class ByteTokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of a text or any data; document_id is 256."""

    vocab_size = 257
    document_id = 256

    def __init__(self):
        self.special_texts = {self.document_id: ""}
        self.num_bytes_W = np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, text: str | bytes, special: bool = False) -> np.ndarray:
        data = text.encode() if isinstance(text, str) else text
        ids = np.frombuffer(data, np.uint8).astype(np.int32)
        return np.append(np.int32(self.document_id), ids) if special else ids

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer from a `tokenizer.json` of the Hugging Face `tokenizers` library.

    path: of the file. document_token: the token whose id is document_id, such as "<|endoftext|>";
      "" adds an id after the file's vocabulary.
    """

    def __init__(self, path: str, document_token: str = ""):
        self._path, self._tokenizer = path, open_file(path)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the size is the largest id plus one.
        self.vocab_size = max(ids.values()) + 1
        if document_token and document_token not in ids:
            raise ValueError(
                f"document_token {document_token!r} is not in the vocabulary of {path!r}. "
                'Name one of its tokens, or leave it "" to add an id.'
            )
        self.document_id = ids[document_token] if document_token else self.vocab_size
        self.vocab_size += not document_token
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_texts = {i: token.content for i, token in added.items() if token.special}
        self.special_texts[self.document_id] = document_token
        self.num_bytes_W = np.zeros(self.vocab_size, np.int32)
        num_bytes = _num_bytes(self._tokenizer)
        for token, i in ids.items():
            # Added tokens stand for their own names, in vocabularies of any spelling.
            self.num_bytes_W[i] = len(token.encode()) if i in added else num_bytes(token)
        if _SPACE not in ids and _SPACE in _spelling(self._tokenizer, "a a"):
            # A space is spelt by three byte tokens: count the first alone.
            for byte in _SPACE.encode()[1:]:
                if (i := ids.get(f"<0x{byte:02X}>")) is not None:
                    self.num_bytes_W[i] = 0
        self.num_bytes_W[self.document_id] = 1 - num_bytes(_spelling(self._tokenizer, "a"))

    def encode(self, text: str | bytes, special: bool = False) -> np.ndarray:
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"A document is not UTF-8 ({error.reason} at byte {error.start}, it begins "
                    f"{text[:40]!r}), and {self._path!r} reads only UTF-8. Convert the file or use "
                    f"tokenizer={BYTES!r}."
                ) from error
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids) -> str:
        ids = [int(i) for i in ids if int(i) not in self.special_texts]
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def open_file(path: str):
    """Returns the `tokenizers.Tokenizer` of a tokenizer.json, without truncation and padding.

    BPE dropout, which makes encoding random, is switched off as well.

    Raises:
      ValueError: the library is not installed, or the file is no tokenizer.json.
      FileNotFoundError: there is no such file.
    """
    try:
        import tokenizers  # a compiled library that runs on bytes need not load
    except ImportError as error:
        raise ValueError(
            "a tokenizer.json is read by the package tokenizers, which is not installed: "
            "pip install 'linear-seqmodels[train]', or tokenizers by itself"
        ) from error

    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"No tokenizer file {path!r}. Give the path of a tokenizer.json, or {BYTES!r}."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path!r} is not a Hugging Face tokenizers file (tokenizer.json): {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def _num_bytes(tokenizer) -> Callable[[str], int]:
    """Returns a function: how many bytes of text a vocabulary entry adds after another entry.

    Byte-level vocabularies spell each byte as one character, and byte fallback spells a byte as
    <0x0A>. Otherwise the file's decoder says it: in SentencePiece U+2581 is a space; in WordPiece
    ## is nothing, and an entry without it has a space before it.
    """
    parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder
    if any(part is not None and b'"type":"ByteLevel"' in part.__getstate__() for part in parts):
        return len
    decode = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode

    def num_bytes(token: str) -> int:
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return 1
        return len(decode(["a", token]).encode()) - 1

    return num_bytes


def _spelling(tokenizer, text: str) -> str:
    """Returns a document's text in the characters of the vocabulary, normalised and pre-tokenised.

    It includes what the tokenizer puts before a document, such as SentencePiece's space.
    """
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))


def bytes_as_file() -> str:
    """Returns the text of a tokenizer.json that has `ByteTokenizer`'s ids.

    Its token for document_id is "<|endoftext|>".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # Byte-level files spell bytes that are no visible characters of Latin-1 by the characters from
    # 256 on.
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
    """Returns whether a tokenizer suits a model of `vocab_size` tokens.

    Its document_id must lie below vocab_size. Of the other ids at most a tenth of vocab_size, or
    256, may lie above, as pretrained models' tokenizers have tokens without an embedding; such an
    id raises an error where it occurs in a text.
    """
    spare = max(vocab_size // 10, 256)
    return tokenizer.vocab_size <= vocab_size + spare and tokenizer.document_id < vocab_size


def make_tokenizer(name: str, document_token: str = "") -> Tokenizer:
    """Makes a ByteTokenizer for the name "bytes", else a FileTokenizer of the file at path `name`.

    Raises ValueError for an empty name, or a document_token for "bytes".
    """
    if name == BYTES:
        if document_token:
            raise ValueError(
                f"document_token {document_token!r} needs a tokenizer file, not bytes."
            )
        return ByteTokenizer()
    if not name:
        raise ValueError(f"tokenizer is empty: give {BYTES!r} or the path of a tokenizer.json.")
    return FileTokenizer(name, document_token)
