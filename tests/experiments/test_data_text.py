"""Text files and tokenizers: the splits, the documents, and what goes wrong."""

import numpy as np
import pytest
import tokenizers as hf

from experiments.data import documents, make_dataset, split_bytes, splits, text, tokenizers

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


def byte_level_file(path):
    """A trained byte-level BPE with one special token."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the ünïcödé"] * 20, trainer)
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizer_file(tmp_path):
    path = byte_level_file(tmp_path / "tokenizer.json")
    words = "the dog, the cat: ünïcödé\n"
    named = tokenizers.make_tokenizer(path, "<|endoftext|>")
    extra = tokenizers.make_tokenizer(path)
    assert extra.vocab_size == named.vocab_size + 1 and extra.document_id == named.vocab_size
    assert named.document_id == 0
    for tokenizer in (named, extra):
        ids = tokenizer.encode_document(words.encode())
        assert ids.dtype == np.int32 and ids[0] == tokenizer.document_id
        assert len(ids) < len(words.encode()) and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == words
        assert tokenizer.num_bytes_W[ids].sum() == len(words.encode())
        assert tokenizer.num_bytes_W.shape == (tokenizer.vocab_size,)


def test_words_with_a_sentencepiece_space_count_their_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581é": 2, "<0x0A>": 3}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "t.json"))
    counts = tokenizers.make_tokenizer(str(tmp_path / "t.json")).num_bytes_W
    assert counts.tolist()[1:] == [4, 3, 1, 0]


def test_wrong_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="No tokenizer file"):
        tokenizers.make_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizers file"):
        tokenizers.make_tokenizer(str(tmp_path / "bad.json"))
    path = byte_level_file(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="'<s>' is not in the vocabulary"):
        tokenizers.make_tokenizer(path, "<s>")
    with pytest.raises(ValueError, match="needs a tokenizer file"):
        tokenizers.make_tokenizer("bytes", "<s>")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1") * 50)
    path = byte_level_file(tmp_path / "tokenizer.json")
    config = {"name": "text", "paths": f"{tmp_path}/latin.txt", "seq_len": 8, "batch_size": 1}
    next(iter(make_dataset(config, "train")))
    with pytest.raises(ValueError, match="not UTF-8 .* at byte 3.*tokenizer='bytes'"):
        next(iter(make_dataset(config | {"tokenizer": path}, "train")))


def test_bytes_round_trip():
    data = bytes(range(256))
    ids = tokenizers.ByteTokenizer().encode_document(data)
    assert tokenizers.ByteTokenizer().decode_bytes(ids) == data
    assert tokenizers.ByteTokenizer().decode([104, 195, 256, 105]) == "h\ufffdi"
