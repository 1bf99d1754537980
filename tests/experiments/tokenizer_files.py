"""Tokenizer files of the kinds that published models bring, small enough to make within a test."""

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

END, TURN = "<|endoftext|>", "<|turn|>"
CORPUS = ["the cat and the dog and the ünïcödé", "Zeile 3 ist 日本 😀, a ## b"] * 20
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]
SPACE = "\u2581"


def _trained(tokenizer, trainer, **options):
    options = {"vocab_size": 330, "show_progress": False} | options
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=[END, TURN, "[UNK]"], **options))
    return tokenizer


def _byte_level(add_prefix_space=False, normalizer=None):
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer, initial_alphabet=alphabet)


def _added_token():
    tokenizer = _byte_level()
    tokenizer.add_tokens([hf.AddedToken("日本", normalized=False), "<think>"])
    return tokenizer


def _fallback(space: bool, before: bool, strip: bool = True):
    """SentencePiece's BPE as converted: all bytes, and some characters; `before`: a space is put
    before a document."""
    tokenizer = hf.Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
    steps = [normalizers.Prepend(SPACE)] * before + [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    letters = [SPACE] * space + [*"abcdehnot#"]
    merges = [("t", "h"), ("th", "e"), ("#", "#")] + [(SPACE, "the"), (SPACE, "a")] * space
    vocabulary = ["[UNK]", END, TURN, *BYTE_TOKENS, *letters, *map("".join, merges)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer.model = models.BPE(ids, merges, byte_fallback=True, unk_token="[UNK]")
    tokenizer.add_special_tokens([END, TURN])
    return tokenizer


def _metaspace(scheme: str):
    tokenizer = hf.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(tokenizer, trainers.UnigramTrainer, unk_token="[UNK]")


def _word_piece():
    tokenizer = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer, vocab_size=90)


def _words():
    tokenizer = hf.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(tokenizer, trainers.WordLevelTrainer)


# Those that keep every text as it is, and those that do not.
FAITHFUL = {
    "byte_level": _byte_level,
    "byte_level_added_token": _added_token,
    "fallback": lambda: _fallback(space=True, before=True),
    "fallback_no_space_before": lambda: _fallback(space=True, before=False, strip=False),
}
OTHERS = {
    "fallback_without_space": lambda: _fallback(space=False, before=True),
    "byte_level_space_before": lambda: _byte_level(add_prefix_space=True),
    "byte_level_lower_nfkc": lambda: _byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "word_piece": _word_piece,
    "words": _words,
}
KINDS = FAITHFUL | OTHERS


def write(kind: str, folder) -> str:
    """The path of a new file of this kind."""
    path = folder / f"{kind}.json"
    KINDS[kind]().save(str(path))
    return str(path)
