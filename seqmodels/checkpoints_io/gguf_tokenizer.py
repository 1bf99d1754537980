"""The tokenizer in a GGUF file's metadata, as a `tokenizers` file.

Byte-level BPE (tokenizer.ggml.model "gpt2"). How text is cut before the merges is not in the file but behind a name,
tokenizer.ggml.pre; those known here are in `_PRE`. A file without that name, or with "default", does not tell.
"""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_GPT2 = None  # the ByteLevel pre-tokenizer's own pattern
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Their tokenizers take a word that is in the vocabulary whole, whatever the merges make of it, and put a bos token first
# where the file says nothing of it.
_WHOLE_WORDS = ("llama-bpe", "llama3")
# name: (pattern of words, digits one by one first, Unicode NFC first)
_PRE = {
    "gpt-2": (_GPT2, False, False),
    "smollm": (_GPT2, True, False),
    "llama-bpe": (_LLAMA3, False, False),
    "llama3": (_LLAMA3, False, False),
    "qwen2": (_QWEN2, False, True),
}


class Unsupported(ValueError):
    """A kind of tokenizer that is not known here."""


def tokenizer_file(metadata: dict[str, Any], name: str) -> Path | None:
    """Writes the tokenizer to $SEQMODELS_CACHE (~/.cache/seqmodels) and returns its path.

    None where the file has none, and, with a warning, where it is of a kind that is not supported: the weights are of use
    with a tokenizer from elsewhere.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    try:
        text = make(metadata, name).to_str()
    except Unsupported as error:
        warnings.warn(f"{error}; give another tokenizer", stacklevel=2)
        return None
    cache = Path(os.environ.get("SEQMODELS_CACHE") or "~/.cache/seqmodels").expanduser()
    folder = cache / "tokenizers" / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / "tokenizer.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"tokenizer.{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)
    return path


def make(metadata: dict[str, Any], name: str):
    """The `tokenizers.Tokenizer` of a GGUF file called `name`.

    Raises ValueError for a kind of tokenizer that is not known, or lists that do not fit together.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    kind, cut = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    named = isinstance(kind, str) and isinstance(cut, str)
    if not named or kind != "gpt2" or cut not in _PRE:
        raise Unsupported(
            f"{name}: a tokenizer of kind {kind!r} with pre-tokenizer {cut!r} is not supported; "
            f"kind 'gpt2' (byte-level BPE) with {', '.join(_PRE)} is"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", name)
    merges = [m.split(" ", 1) for m in _strings(metadata, "tokenizer.ggml.merges", name)]
    types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        raise ValueError(f"{name}: tokenizer.ggml.token_type must be a list of integers")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{name}: {len(tokens)} tokens, {len(set(tokens))} different, and {len(types)} token types"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if bad := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()]:
        raise ValueError(f"{name}: merge {' '.join(bad[0])!r} is of tokens that are not there")
    whole_words = cut in _WHOLE_WORDS
    pairs = [tuple(m) for m in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole_words))
    words, digits_first, nfc = _PRE[cut]
    steps = [pre.Digits(individual_digits=True)] if digits_first else []
    if words is not None:
        steps.append(pre.Split(Regex(words), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types):
        added = AddedToken(token, normalized=False, special=token_type == _CONTROL)
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([added])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([added])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", whole_words and bos is not None) is True:
        _start_with(tokenizer, tokens, bos, name)
    return tokenizer


def _start_with(tokenizer, tokens, bos, name: str) -> None:
    from tokenizers import processors

    if type(bos) is not int or not 0 <= bos < len(tokens):
        raise ValueError(f"{name}: tokenizer.ggml.bos_token_id is {bos!r}, no token's number")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
    )


def _strings(metadata: dict[str, Any], key: str, name: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        raise ValueError(f"{name}: {key} must be a list of strings")
    return value
