"""Makes a tokenizer.json of a GGUF file's metadata, and reads its special tokens.

Kinds of tokenizers (tokenizer.ggml.model):

- "gpt2": byte-level BPE. The file names the rule that cuts text into words (tokenizer.ggml.pre) and
  does not hold it; `_PRE` has the rules that we know. A file without a name, or with "default", is
  not supported.
- "llama": SentencePiece's BPE, with scores of tokens in place of merges, spaces as U+2581, and
  bytes where no token spells a character.
- "t5": SentencePiece's unigram model.

Not supported are "bert" (the file does not tell what is done to case and accents), "rwkv" and
"plamo2" (the `tokenizers` library has no such model). "none" is a file without a tokenizer.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.checkpoints_io import special_tokens
from seqmodels.checkpoints_io.special_tokens import SpecialTokens

_KEY = "tokenizer.ggml"
_TEMPLATE = "tokenizer.chat_template"
# GGUF's names of special tokens: those that chat templates use.
_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "padding": "pad_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # spelt so in the format
    "mask": "mask_token",
}
# Ids of kinds whose files need not give them.
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "padding": 0, "unknown": 2},
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of tokens
_SPACE = "\u2581"  # SentencePiece's letter for a space
# Patterns of words. None is that of the library's ByteLevel.
_GPT2 = None
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: the pattern of words, and a rule. "digits" cuts digits apart first, "nfc" is
# Unicode's NFC first, and "whole" takes a word of the vocabulary whole, whatever the merges make of
# it, and begins texts with bos unless the file says otherwise.
_PRE = {
    "gpt-2": (_GPT2, ""),
    **dict.fromkeys(("smollm", "starcoder"), (_GPT2, "digits")),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3, "whole")),
    "smaug-bpe": (_LLAMA3, ""),
    "qwen2": (_QWEN2, "nfc"),
    "deepseek-r1-qwen": (_QWEN2, ""),
    "tekken": (_TEKKEN, "whole"),
}


class Unsupported(ValueError):
    """Raised for a kind of tokenizer that is not supported."""


def tokenizer_file(metadata: dict[str, Any], name: str) -> Path | None:
    """Writes a GGUF file's tokenizer to the cache as a tokenizer.json; returns its path.

    Returns None if the file has no tokenizer and, with a warning, if that is of an unsupported
    kind: the weights can be used with another tokenizer.
    """
    if metadata.get(f"{_KEY}.model") in (None, "none", "no_vocab"):
        return None
    try:
        text = make(metadata, name).to_str()
    except Unsupported as error:
        warnings.warn(f"{error}; give another tokenizer", stacklevel=2)
        return None
    return special_tokens.keep(text, special_tokens_of(metadata))


def special_tokens_of(metadata: dict[str, Any]) -> SpecialTokens:
    """Returns the special tokens and chat templates of a GGUF file's metadata.

    Its tokens for the ends of a text (eos), a turn (eot) and a message (eom) may differ; all are in
    `eos` of the result. Ids outside the vocabulary are ignored.
    """
    tokens = metadata.get(f"{_KEY}.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = {name: _id(metadata, name, len(tokens)) for name in (*_NAMES, "eot", "eom")}
    ids = {name: i for name, i in found.items() if i is not None}
    eos = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)
    names = {_NAMES[name]: tokens[i] for name, i in ids.items() if name in _NAMES}
    templates = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or special_tokens.DEFAULT: text
        for key, text in metadata.items()
        if (key == _TEMPLATE or key.startswith(_TEMPLATE + ".")) and isinstance(text, str)
    }
    return SpecialTokens(ids.get("bos"), tuple(eos), ids.get("padding"), names, templates)


def make(metadata: dict[str, Any], name: str):
    """Returns the `tokenizers.Tokenizer` that a GGUF file's metadata describes.

    Raises ValueError, naming the file by `name`, for an unsupported kind or inconsistent lists.
    """
    from tokenizers import AddedToken

    kind = metadata[f"{_KEY}.model"]
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}
    if not isinstance(kind, str) or kind not in makers:
        raise Unsupported(
            f"{name}: a tokenizer of kind {kind!r} is not supported; {', '.join(makers)} are"
        )
    tokens = _strings(metadata, f"{_KEY}.tokens", name)
    types = metadata.get(f"{_KEY}.token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        raise ValueError(f"{name}: {_KEY}.token_type must be a list of integers")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{name}: {len(tokens)} tokens, {len(set(tokens))} different, and {len(types)} token types"
        )
    tokenizer, starts, ends = makers[kind](metadata, tokens, types.tolist(), name)
    # Tokens that are found in a text before it is cut into words.
    whole = [AddedToken(token, normalized=False) for token in tokens]
    tokenizer.add_special_tokens([t for t, of in zip(whole, types) if of in (_CONTROL, _UNKNOWN)])
    tokenizer.add_tokens([t for t, of in zip(whole, types) if of == _USER_DEFINED])
    _add_at_ends(tokenizer, metadata, tokens, name, bos=starts, eos=ends)
    return tokenizer


def _byte_level(metadata, tokens, types, name):
    """Makes a byte-level BPE tokenizer, GGUF's kind "gpt2".

    Returns, like the functions for other kinds, (tokenizer, whether texts begin with bos, whether
    they end with eos); the file's metadata may override both flags.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    cut = metadata.get(f"{_KEY}.pre")
    if not isinstance(cut, str) or cut not in _PRE:
        raise Unsupported(
            f"{name}: a tokenizer of kind 'gpt2' with pre-tokenizer {cut!r} is not supported; with {', '.join(_PRE)} it is"
        )
    merges = [m.split(" ", 1) for m in _strings(metadata, f"{_KEY}.merges", name)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if bad := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()]:
        raise ValueError(f"{name}: merge {' '.join(bad[0])!r} is of tokens that are not there")
    words, rule = _PRE[cut]
    whole_words = rule == "whole"
    pairs = [(left, right) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole_words))
    steps: list[Any] = [pre.Digits(individual_digits=True)] if rule == "digits" else []
    if words is not None:
        steps.append(pre.Split(Regex(words), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if rule == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole_words, False


def _sentencepiece(metadata, tokens, types, name):
    """Makes a SentencePiece BPE tokenizer, GGUF's kind "llama"; returns the same as `_byte_level`.

    SentencePiece keeps joining the neighbours whose token has the highest score. Here that is a
    list of merges in the order of scores, and equal scores in the order of ids.
    """
    from tokenizers import Tokenizer, models

    scores = _scores(metadata, tokens, name)
    normal = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    merges = [
        (-scores[i], i, token[:cut], token[cut:])
        for token, i in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    made = {i: score for score, i, _, _ in merges}
    if tied := len(made) - len(set(made.values())):
        warnings.warn(
            f"{name}: {tied} tokens have another's score; where two such overlap in a text the one of the lower id is "
            "taken here, the one further left by SentencePiece",
            stacklevel=2,
        )
    unknown = _unknown(metadata, tokens, name)
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = Tokenizer(model)
    _spell_spaces(tokenizer, metadata, name)
    return tokenizer, True, False


def _unigram(metadata, tokens, types, name):
    """Makes a SentencePiece unigram tokenizer, kind "t5"; returns the same as `_byte_level`."""
    from tokenizers import Tokenizer, models

    scored = list(zip(tokens, _scores(metadata, tokens, name)))
    unknown = _unknown(metadata, tokens, name)
    tokenizer = Tokenizer(models.Unigram(scored, unknown, _BYTE in types))
    _spell_spaces(tokenizer, metadata, name)
    return tokenizer, False, True


def _spell_spaces(tokenizer, metadata, name: str) -> None:
    """Makes a tokenizer normalize text as SentencePiece does: by the file's own table, then with a
    space in front and U+2581 for spaces. Decoding undoes the latter two."""
    from tokenizers import Regex, decoders, normalizers

    charsmap = metadata.get(f"{_KEY}.precompiled_charsmap")
    steps = [] if charsmap is None else [_precompiled(charsmap, name)]
    if metadata.get(f"{_KEY}.remove_extra_whitespaces") is True:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    prefix = metadata.get(f"{_KEY}.add_space_prefix", True) is True
    steps += [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(parts)


def _precompiled(charsmap, name: str):
    from tokenizers import normalizers

    try:
        return normalizers.Precompiled(np.asarray(charsmap).astype(np.uint8).tobytes())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{name}: {_KEY}.precompiled_charsmap is broken: {error}") from error


def _add_at_ends(tokenizer, metadata, tokens, name: str, **default: bool) -> None:
    """Makes a tokenizer add bos before and eos after a text, if the GGUF file's metadata says so.

    default: for "bos" and "eos", whether to add them where the metadata says nothing.
    """
    from tokenizers import processors

    added = {}
    for which, usual in default.items():
        i = _id(metadata, which, len(tokens))
        if metadata.get(f"{_KEY}.add_{which}_token", usual and i is not None) is not True:
            continue
        if i is None:
            found = metadata.get(f"{_KEY}.{which}_token_id")
            raise ValueError(f"{name}: {_KEY}.{which}_token_id is {found!r}, no token's number")
        added[which] = (tokens[i], i)
    if added:
        parts = {"bos": added.get("bos"), "text": ("$A", None), "eos": added.get("eos")}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part[0] for part in parts.values() if part], special_tokens=list(added.values())
        )


def _id(metadata: dict[str, Any], name: str, count: int) -> int | None:
    """Returns the id of a GGUF file's special token, such as "bos", or None if there is none.

    An id that is absent, or not below `count`, is replaced by the usual one of the tokenizer's
    kind.
    """
    kind = metadata.get(f"{_KEY}.model")
    usual = _DEFAULT_IDS.get(kind if isinstance(kind, str) else "", {}).get(name)
    for i in (metadata.get(f"{_KEY}.{name}_token_id"), usual):
        if type(i) is int and 0 <= i < count:
            return i
    return None


def _unknown(metadata, tokens: list[str], name: str) -> int:
    """Returns the id of the token that stands for characters outside the vocabulary."""
    i = _id(metadata, "unknown", len(tokens))
    if i is None:
        raise ValueError(f"{name}: {_KEY}.unknown_token_id is no token's number")
    return i


def _scores(metadata: dict[str, Any], tokens: list[str], name: str) -> list[float]:
    scores = metadata.get(f"{_KEY}.scores")
    numbers = isinstance(scores, np.ndarray) and scores.dtype.kind in "fiu"
    if scores is None or not numbers or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise ValueError(f"{name}: {_KEY}.scores must be a list of {len(tokens)} numbers")
    return scores.astype(float).tolist()


def _strings(metadata: dict[str, Any], key: str, name: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        raise ValueError(f"{name}: {key} must be a list of strings")
    return value
