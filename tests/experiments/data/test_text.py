"""Text files and tokenizers: the splits, the documents, and what goes wrong."""

import numpy as np
import pytest
import tokenizers as hf

from experiments.data import (
    documents,
    make_dataset,
    packing,
    splits,
    text,
)
from seqmodels.text import tokenizers
from tests.experiments import tokenizer_files
from tests.experiments.data_helpers import split_bytes

SPLITS = ("train", "validation", "test")


def write(folder, count):
    for i in range(count):
        path = folder / f"part{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"the text of file {i}\n".encode() * 3)
    return {"name": "text", "paths": str(folder)}


def all_bytes(source):
    return [source[i] for i in range(len(source))]


def test_many_files_are_split_by_name(tmp_path):
    config = write(tmp_path, 200)
    held = {split: set(all_bytes(documents(config, split))) for split in SPLITS}
    assert sum(map(len, held.values())) == 200 == len(set.union(*held.values()))
    assert len(held["train"]) > 160
    (tmp_path / "another.txt").write_text("one more")  # moves nobody else
    after = {split: set(all_bytes(documents(config, split))) for split in SPLITS}
    assert all(held[s] <= after[s] for s in SPLITS)


def test_the_split_of_a_name_is_fixed():
    assert [splits.split_of(n) for n in ("os.py", "re.py", "file6.txt")] == [
        splits.split_of(n) for n in ("os.py", "re.py", "file6.txt")
    ]
    count = [splits.split_of(f"{i}.py") for i in range(20_000)]
    assert [round(count.count(s) / 20_000, 2) for s in SPLITS] == [0.9, 0.05, 0.05]
    assert splits.split_of("json/decoder.py") == "train"  # sha256 of the name, on any machine


@pytest.mark.parametrize("line", ["a line of text, ünïcödé\n", "ünïcödé without any line end "])
@pytest.mark.parametrize("kind", ["files", "lines"])
def test_one_file_is_cut_by_position_and_nothing_is_lost(tmp_path, line, kind):
    data = "".join(f"{i} {line}" for i in range(9000)).encode()
    (tmp_path / "book.txt").write_bytes(data)
    config = {"name": "text", "paths": str(tmp_path / "book.txt"), "documents": kind}
    parts = [all_bytes(documents(config, split)) for split in SPLITS]
    end = b"\n" if kind == "lines" and line.endswith("\n") else b""
    assert b"".join(d + end for part in parts for d in part) == data
    sizes = [sum(map(len, part)) / len(data) for part in parts]
    np.testing.assert_allclose(sizes, [0.9, 0.05, 0.05], atol=0.05)
    # One file is one document: the pieces that it is read in do not end.
    ends = [not isinstance(document, text.Piece) for part in parts for document in part]
    if kind == "files":
        assert ends == [False] * (len(ends) - 1) + [True]
    else:
        assert all(ends) or not end
    for part in parts:
        for document in part:
            document.decode()  # no cut inside a character
            assert kind == "lines" or len(document) <= 2 * (1 << 14) + len(line)
    assert kind == "lines" or len(parts[0]) > 5, "many rows can read the book at once"


def test_lines_are_documents_without_their_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo\n three")
    source = text.text_documents(
        str(tmp_path), "test", held_out_paths={"test": str(tmp_path / "a.txt")}, documents="lines"
    )
    assert all_bytes(source) == [b"one", b"two", b" three"]


def test_paths_are_files_folders_and_globs(tmp_path):
    write(tmp_path, 6)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    assert len(text.find_files(str(tmp_path))) == 6
    assert len(text.find_files(str(tmp_path / "**" / "file[12].txt"))) == 2
    both = f"{tmp_path}/part0, {tmp_path}/part1/file1.txt"
    assert [name for _, name in text.find_files(both)] == ["file0.txt", "file3.txt", "file1.txt"]


def test_held_out_files_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("held out")
    config = {"name": "text", "paths": f"{tmp_path}/a.txt", "paths_validation": f"{tmp_path}/b.txt"}
    assert split_bytes(config, "train") == b"training text"
    assert split_bytes(config, "validation") == b"held out"
    with pytest.raises(ValueError, match="paths_test is empty"):
        documents(config, "test")


def test_wrong_paths(tmp_path):
    with pytest.raises(ValueError, match="set config.data.paths"):
        make_dataset({"name": "text"}, "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_dataset({"name": "text", "paths": str(tmp_path / "nowhere")}, "train")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="Empty corpus: the train split"):
        make_dataset({"name": "text", "paths": str(tmp_path)}, "train")
    with pytest.raises(ValueError, match="files, lines"):
        make_dataset({"name": "text", "paths": str(tmp_path), "documents": "words"}, "train")
    with pytest.raises(ValueError, match="document_bytes is -1; it must be at least 1"):
        make_dataset({"name": "text", "paths": str(tmp_path), "document_bytes": -1}, "train")


def test_a_tokenizer_file(tmp_path):
    path = tokenizer_files.write("byte_level", tmp_path)
    words = "the dog, the cat: ünïcödé\n"
    named = tokenizers.make_tokenizer(path, "<|endoftext|>")
    extra = tokenizers.make_tokenizer(path)
    assert extra.vocab_size == named.vocab_size + 1 and extra.document_id == named.vocab_size
    assert named.document_id == 0
    for tokenizer in (named, extra):
        ids = tokenizer.encode(words.encode())
        assert ids.dtype == np.int32 and len(ids) < len(words.encode())
        assert tokenizer.decode([tokenizer.document_id, *ids]) == words
        assert tokenizer.num_bytes_W[ids].sum() == len(words.encode())
        assert tokenizer.num_bytes_W.shape == (tokenizer.vocab_size,)


def random_texts(count=60, seed=0):
    """Words, spaces and lines as they come; what only some vocabularies spell; special tokens by
    name."""
    parts = [
        "the",
        "cat",
        "a",
        "Zeile",
        "##",
        "ünï",
        "日",
        "本",
        "日本",
        "😀",
        "ﬁ",
        "e\u0301",
        "\u2581",
        "\u2582",
    ]
    parts += [" ", " ", " ", "  ", "\n", "\t", ", ", "<think>", tokenizer_files.TURN]
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(parts, rng.integers(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("kind", tokenizer_files.KINDS)
def test_the_bytes_of_a_document_are_those_of_its_text(kind, tmp_path):
    path = tokenizer_files.write(kind, tmp_path)
    for document_token in (tokenizer_files.END, ""):
        tokenizer = tokenizers.make_tokenizer(path, document_token)
        for words in random_texts():
            data = words.encode()
            tokens_N2 = packing.document_tokens(tokenizer, data)
            ids_N = tokens_N2[:, 0]
            assert ids_N[0] == ids_N[-1] == tokenizer.document_id
            assert ids_N[1:-1].tolist() == tokenizer.encode(words).tolist()
            assert tokens_N2[1:, 1].sum() == len(data)
            # Within a document each id has its own; a file that keeps text as it is has no others.
            np.testing.assert_array_equal(tokens_N2[1:-1, 1], tokenizer.num_bytes_W[ids_N[1:-1]])
            # SentencePiece reads its own sign as a space, and puts one behind special tokens, too.
            changed = "\u2581" in words or kind == "fallback" and tokenizer_files.TURN in words
            if kind in tokenizer_files.FAITHFUL and not changed:
                assert tokenizer.num_bytes_W[ids_N[1:]].sum() == len(data), words


@pytest.mark.parametrize("kind", ["word_piece", "fallback", "byte_level_lower_nfkc"])
def test_the_bytes_of_one_pass_are_those_of_the_split(kind, tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(t.replace("\n", "") for t in random_texts()))
    config = {"name": "text", "paths": f"{tmp_path}/held.txt", "paths_test": f"{tmp_path}/held.txt"}
    config |= {"documents": "lines", "seq_len": 16, "batch_size": 2}
    config |= {
        "tokenizer": tokenizer_files.write(kind, tmp_path),
        "document_token": "<|endoftext|>",
    }
    counted = sum(batch["num_bytes"].sum() for batch in make_dataset(config, "test"))
    assert counted == len(split_bytes(config, "test"))


@pytest.mark.parametrize(
    "kind, counts",
    [
        ("byte_level_added_token", {"日本": 6, "<think>": 7, "Ġthe": 4, tokenizer_files.TURN: 8}),
        ("byte_level_space_before", {"Ġthe": 4, "t": 1, tokenizer_files.END: -1}),
        ("fallback", {"##": 2, "\u2581the": 4, "<0xE2>": 1, "<0x96>": 1, tokenizer_files.END: -1}),
        ("fallback_no_space_before", {"\u2581the": 4, tokenizer_files.END: 0}),
        ("fallback_without_space", {"<0xE2>": 1, "<0x96>": 0, "<0x81>": 0, "<0x0A>": 1}),
        ("metaspace_first", {"\u2581": 1, tokenizer_files.END: -1}),
        ("word_piece", {"the": 4, "##e": 1, ",": 1, tokenizer_files.END: -1}),
        ("words", {"the": 4, "日本": 7, tokenizer_files.END: -1}),
    ],
)
def test_bytes_of_single_tokens(kind, counts, tmp_path):
    path = tokenizer_files.write(kind, tmp_path)
    ids = hf.Tokenizer.from_file(path).get_vocab()
    found = tokenizers.make_tokenizer(path, tokenizer_files.END).num_bytes_W
    assert {token: found[ids[token]] for token in counts} == counts


def test_what_a_file_was_saved_with_does_not_touch_a_text(tmp_path):
    path = tokenizer_files.write("byte_level", tmp_path)
    words = "the cat and the dog " * 3
    expected = tokenizers.make_tokenizer(path).encode(words).tolist()
    settings = hf.Tokenizer.from_file(path)
    settings.enable_truncation(4)
    settings.enable_padding(length=64)
    settings.model.dropout = 0.9
    settings.post_processor = hf.processors.TemplateProcessing(
        single=f"{tokenizer_files.TURN} $A", special_tokens=[(tokenizer_files.TURN, 1)]
    )
    settings.save(path)
    assert len(hf.Tokenizer.from_file(path).encode(words).ids) == 64
    tokenizer = tokenizers.make_tokenizer(path)
    assert tokenizer.encode(words).tolist() == expected
    assert tokenizer.encode(words, special=True).tolist() == [1, *expected]


def test_wrong_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="No tokenizer file"):
        tokenizers.make_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizers file"):
        tokenizers.make_tokenizer(str(tmp_path / "bad.json"))
    path = tokenizer_files.write("byte_level", tmp_path)
    with pytest.raises(ValueError, match="'<s>' is not in the vocabulary"):
        tokenizers.make_tokenizer(path, "<s>")
    with pytest.raises(ValueError, match="needs a tokenizer file"):
        tokenizers.make_tokenizer("bytes", "<s>")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1") * 50)
    path = tokenizer_files.write("byte_level", tmp_path)
    config = {"name": "text", "paths": f"{tmp_path}/latin.txt", "seq_len": 8, "batch_size": 1}
    next(iter(make_dataset(config, "train")))
    with pytest.raises(ValueError, match="not UTF-8 .* at byte 3.*tokenizer='bytes'"):
        next(iter(make_dataset(config | {"tokenizer": path}, "train")))


def test_bytes_round_trip():
    data = bytes(range(256))
    tokenizer = tokenizers.ByteTokenizer()
    assert tokenizer.encode(data).tolist() == list(range(256))
    assert tokenizer.encode(data, special=True).tolist() == [256, *range(256)]
    text = "naïve 日本 😀"
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert tokenizer.decode([104, 195, 256, 105]) == "h\ufffdi"
