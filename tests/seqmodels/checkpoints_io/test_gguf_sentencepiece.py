"""SentencePiece tokenizers in GGUF metadata, against their definition; and what such files say of
special tokens."""

import numpy as np
import pytest

from seqmodels.checkpoints_io import gguf_tokenizer, special_tokens
from seqmodels.checkpoints_io.special_tokens import SpecialTokens

SPACE = "\u2581"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CONTROL = ["<unk>", "<s>", "</s>", "<end>"]
PIECES = {
    SPACE: -9, "a": -10, "b": -11, "c": -12, "<": -13, "s": -14, ">": -15, "ab": -2, f"{SPACE}ab": -1,
    "bc": -1.5, "abc": -7, f"{SPACE}{SPACE}": -3, "ca": -5, "<s": -1.25,
}  # fmt: skip
TOKENS = [*CONTROL, *BYTES, *PIECES, "<tool>", "xy"]
TYPES = [2, 3, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 5]
SCORES = [0.0] * (4 + 256) + list(PIECES.values()) + [0.0, 0.0]


def metadata(**fields):
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": TOKENS,
        "scores": np.array(SCORES, np.float32),
        "token_type": np.array(TYPES, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (found | fields).items()}


def by_definition(text):
    """Of all neighbours that are a piece together, those of the highest score are joined, the
    leftmost first."""
    parts = list((SPACE + text).replace(" ", SPACE))
    while True:
        pairs = ["".join(pair) for pair in zip(parts, parts[1:])]
        found = [(-PIECES[pair], i) for i, pair in enumerate(pairs) if pair in PIECES]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    spelt = [[p] if p in PIECES else [BYTES[b] for b in p.encode()] for p in parts]
    return [token for tokens in spelt for token in tokens]


def test_neighbours_are_joined_by_score():
    tokenizer = gguf_tokenizer.make(metadata(), "tiny.gguf")
    # bc has a higher score than ab and comes first, which leaves a + bc; without a c there is ab,
    # then _ab.
    assert tokenizer.encode("abc ab").tokens == ["<s>", SPACE, "abc", f"{SPACE}ab"]
    random = np.random.default_rng(0)
    for length in random.integers(1, 25, 200):
        text = "".join(random.choice(list("aabbc  x\u00e9\n<s>"), length))
        text = text.replace("<s>", "<c>")
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert encoded.tokens == by_definition(text)
        assert tokenizer.decode(encoded.ids) == text


def test_control_tokens_stand_apart_and_bytes_are_no_text():
    tokenizer = gguf_tokenizer.make(metadata(), "tiny.gguf")
    tokens = tokenizer.encode("ab<end>ab<tool>xy<0x41>", add_special_tokens=False).tokens
    # A space is put before what follows a special token, too; <0x41> in a text is seven characters,
    # and xy is not in use.
    byte = [BYTES[ord(c)] for c in "0x41"]
    assert tokens == [
        *(f"{SPACE}ab", "<end>", f"{SPACE}ab", "<tool>", SPACE, BYTES[ord("x")], BYTES[ord("y")]),
        *("<", *byte, ">"),
    ]
    ids = tokenizer.encode("ab<end><tool>").ids
    assert tokenizer.decode(ids) == "ab<tool>"  # of the two only <end> is special


def test_without_bytes_a_character_that_no_token_spells_is_unknown():
    kept = [i for i, token in enumerate(TOKENS) if token not in BYTES]
    lists = {
        "tokens": [TOKENS[i] for i in kept],
        "scores": np.array(SCORES)[kept],
        "token_type": np.array(TYPES)[kept],
    }
    tokenizer = gguf_tokenizer.make(metadata(**lists), "tiny.gguf")
    assert tokenizer.encode("a\u00e9\u00e9b").tokens == ["<s>", SPACE, "a", "<unk>", "b"]


@pytest.mark.parametrize(
    "fields, tokens, text",
    [
        ({"add_bos_token": False}, [f"{SPACE}ab"], "ab"),
        ({"add_eos_token": True}, ["<s>", f"{SPACE}ab", "</s>"], "ab"),
        ({"add_space_prefix": False}, ["<s>", "ab"], "ab"),
        ({"add_space_prefix": False}, ["<s>", f"{SPACE}ab"], " ab"),
        ({"bos_token_id": 3}, ["<end>", f"{SPACE}ab"], "ab"),
        ({"bos_token_id": None}, ["<s>", f"{SPACE}ab"], "ab"),  # the kind's own
    ],
)
def test_what_is_put_at_the_ends(fields, tokens, text):
    tokenizer = gguf_tokenizer.make(metadata(**fields), "tiny.gguf")
    encoded = tokenizer.encode(text)
    assert encoded.tokens == tokens
    assert tokenizer.decode(encoded.ids) == text


def test_tokens_of_one_score_are_told():
    scores = np.array(SCORES, np.float32)
    scores[TOKENS.index("bc")] = scores[TOKENS.index("ab")]
    with pytest.warns(UserWarning, match="tiny.gguf: 1 tokens have another's score"):
        gguf_tokenizer.make(metadata(scores=scores), "tiny.gguf")


def test_a_unigram_model_takes_the_likeliest_spelling():
    fields = {"model": "t5", "unknown_token_id": 0, "remove_extra_whitespaces": True}
    tokenizer = gguf_tokenizer.make(metadata(**fields), "tiny.gguf")
    # "_abc": _ab + c is -13, _ + abc -16, _ + a + bc -20.5. "_aabc": _ + a + abc is -26, _ + a + a
    # + bc -30.5.
    assert tokenizer.encode("abc").tokens == [f"{SPACE}ab", "c", "</s>"]
    assert tokenizer.encode("aabc").tokens == [SPACE, "a", "abc", "</s>"]
    assert tokenizer.encode("  ab   ab ").tokens == [f"{SPACE}ab", f"{SPACE}ab", "</s>"]
    assert tokenizer.encode("\u00e9").tokens[1:] == ["<0xC3>", "<0xA9>", "</s>"]


def test_several_ends_names_and_templates():
    fields = metadata(eot_token_id=3, eom_token_id=2, padding_token_id=0, seperator_token_id=999)
    fields |= {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    templates = {"default": "d", "tool_use": "t"}
    expected = SpecialTokens(1, (2, 3), 0, names, templates)
    assert gguf_tokenizer.special_tokens_of(fields) == expected
    # The same of the files that are written beside the tokenizer, which a run takes along.
    path = gguf_tokenizer.tokenizer_file(fields, "tiny.gguf")
    assert special_tokens.read(path.parent) == expected
    assert gguf_tokenizer.tokenizer_file(fields, "another.gguf") == path
    fields["tokenizer.chat_template"] = "other"
    other = gguf_tokenizer.tokenizer_file(fields, "tiny.gguf")
    assert special_tokens.read(other.parent).chat_templates == templates | {"default": "other"}
    assert not list(path.parent.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scores": np.zeros(3)}, "scores must be a list of"),
        ({"scores": np.full(len(TOKENS), np.nan)}, "scores must be a list of"),
        ({"scores": ["x"] * len(TOKENS)}, "scores must be a list of"),
        ({"model": "t5", "precompiled_charsmap": np.zeros(3, np.uint8)}, "charsmap is broken"),
        ({"model": "t5", "precompiled_charsmap": "x"}, "charsmap is broken"),
        ({"model": "gpt2", "merges": []}, "pre-tokenizer 'default' is not supported"),
        ({"model": "plamo2"}, "kind 'plamo2' is not supported; gpt2, llama, t5 are"),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        gguf_tokenizer.make(metadata(**fields), "tiny.gguf")
    assert "tiny.gguf" in str(error.value)
