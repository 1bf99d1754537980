"""What files say about tokens, by hand: which file counts, and that what is read is written."""

import json

import pytest
import tokenizers

from seqmodels.checkpoints_io import special_tokens
from seqmodels.checkpoints_io.special_tokens import SpecialTokens

WORDS = {"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<turn>": 4, "<pad>": 5}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def put(folder, **fields):
    """JSON files by name, with a tokenizer.json of WORDS, of which the last is an added token
    alone."""
    folder.mkdir(exist_ok=True, parents=True)
    words = {word: i for word, i in WORDS.items() if word != "<pad>"}
    tokenizer = {"model": {"vocab": words}, "added_tokens": [{"id": 5, "content": "<pad>"}]}
    for name, value in ({"tokenizer": tokenizer} | fields).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_generation_config_counts_then_config_then_the_tokenizers_names(tmp_path):
    config = {"bos_token_id": 0, "eos_token_id": 1}
    described = PLAIN | {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    folder = put(tmp_path, tokenizer_config=described)
    assert special_tokens.read(folder).ids() == {
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 5,
    }
    put(tmp_path, config=config)
    found = special_tokens.read(folder)
    assert (found.bos, found.eos, found.pad) == (0, (1,), 5)
    put(tmp_path, generation_config={"eos_token_id": [3, 4], "bos_token_id": None})
    found = special_tokens.read(folder)
    assert (found.bos, found.eos, found.pad) == (0, (3, 4), 5)
    # Templates are given the tokenizer's own names, whatever the ids are.
    assert found.names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("value", [None, -1, True, "3", 1.5, [], [None, "x"], {"a": 1}])
def test_what_is_no_id_is_passed_over(value, tmp_path):
    folder = put(tmp_path, generation_config={"eos_token_id": value}, config={"eos_token_id": 4})
    assert special_tokens.read(folder).eos == (4,)


def test_names_are_told_or_a_classs_own(tmp_path):
    config = {"bos_token_id": 2, "eos_token_id": [4, 3], "pad_token_id": 5}
    told = {"none": {}, "plain": PLAIN | {"unk_token": "a"}}
    for name, described in told.items():
        folder = put(tmp_path / name, config=config, tokenizer_config=described)
        assert special_tokens.read(folder).names == {
            k: v for k, v in described.items() if k == "unk_token"
        }
    own = {"tokenizer_class": "LlamaTokenizer"}
    folder = put(tmp_path / "own", config=config, tokenizer_config=own)
    assert special_tokens.read(folder).names == {"bos_token": "<s>", "eos_token": "<turn>"}
    folder = put(tmp_path / "not", config=config, tokenizer_config=own | {"bos_token": None})
    assert special_tokens.read(folder).names == {"eos_token": "<turn>"}
    # Where nothing describes a tokenizer yet, what is written does.
    alone = put(tmp_path / "alone")
    special_tokens.write(alone, SpecialTokens(bos=2, eos=(4, 3)), alone / "tokenizer.json")
    assert special_tokens.read(alone).names == {"bos_token": "<s>", "eos_token": "<turn>"}


def test_the_older_map_counts_where_no_added_tokens_are_listed(tmp_path):
    described = PLAIN | {"eos_token": "</s>", "add_bos_token": True, "image_token": "b"}
    old = {"eos_token": {"content": "<turn>", "lstrip": False}, "extra_special_tokens": {"x": "a"}}
    folder = put(tmp_path, tokenizer_config=described, special_tokens_map=old)
    found = special_tokens.read(folder)
    assert found.eos == (4,)
    assert found.names == {"eos_token": "<turn>", "image_token": "b", "x": "a"}
    (tmp_path / "out").mkdir()
    special_tokens.write(tmp_path / "out", found, folder / "tokenizer.json")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    token = {"__type": "AddedToken", "content": "<turn>", "lstrip": False}
    assert written == described | {"eos_token": token, "extra_special_tokens": {"x": "a"}}
    assert special_tokens.read(tmp_path / "out") == found
    put(tmp_path, tokenizer_config=described | {"added_tokens_decoder": {}})
    assert special_tokens.read(folder).eos == (3,)


def test_templates_by_name_and_in_files(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}, "?"]
    folder = put(tmp_path, tokenizer_config={"chat_template": named})
    assert special_tokens.read(folder).chat_templates == {"tool_use": "t", "default": "d"}
    put(tmp_path, tokenizer_config={"chat_template": "alone"})
    assert special_tokens.read(folder).chat_templates == {"default": "alone"}
    (folder / "chat_template.jinja").write_text("{{ 'é' }}\n", encoding="utf-8")
    more = folder / "additional_chat_templates" / "rag.jinja"
    more.parent.mkdir()
    more.write_text("r")
    assert special_tokens.read(folder).chat_templates == {"default": "{{ 'é' }}\n", "rag": "r"}


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "config.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_copy_is_byte_for_byte_and_lacks_nothing(tmp_path):
    described = PLAIN | {
        "eos_token": {"content": "</s>"},
        "model_max_length": 7,
        "chat_template": "c",
    }
    generation = {"eos_token_id": [3, 4], "temperature": 0.6}
    folder = put(tmp_path / "a", tokenizer_config=described, generation_config=generation)
    found = special_tokens.read(folder)
    (tmp_path / "b").mkdir()
    paths = special_tokens.write(tmp_path / "b", found, folder / "tokenizer.json")
    assert contents(tmp_path / "b") == contents(folder)
    assert {str(p.relative_to(tmp_path / "b")) for p in paths} == set(contents(folder))
    (folder / "chat_template.jinja").write_text("other")
    found = special_tokens.read(folder)
    special_tokens.write(tmp_path / "b", found, folder / "tokenizer.json")
    assert contents(tmp_path / "b") == contents(folder)
    special_tokens.write(folder, found, folder / "tokenizer.json")  # onto itself
    assert contents(tmp_path / "b") == contents(folder)


def test_what_config_json_said_is_written_where_a_run_has_no_such_file(tmp_path):
    said = {"generation_config": {"top_p": 0.9}, "tokenizer_config": PLAIN}
    folder = put(tmp_path / "a", config={"eos_token_id": 4}, **said)
    (tmp_path / "b").mkdir()
    special_tokens.write(tmp_path / "b", special_tokens.read(folder), folder / "tokenizer.json")
    assert special_tokens.read(tmp_path / "b") == special_tokens.read(folder)
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"top_p": 0.9, "eos_token_id": 4}


def test_what_is_said_otherwise_replaces_what_the_files_say(tmp_path):
    described = PLAIN | {"eos_token": "</s>", "chat_template": "old"}
    folder = put(tmp_path / "a", tokenizer_config=described)
    out = put(tmp_path / "b")
    (out / "chat_template.jinja").write_text("another model's")
    put(out, special_tokens_map={"bos_token": "b"}, added_tokens={"<other>": 9})
    templates = {"default": "new", "../../up": "stays inside"}
    tokens = SpecialTokens(2, (4, 3), None, {"eos_token": "<turn>"}, templates)
    special_tokens.write(out, tokens, folder / "tokenizer.json")
    assert special_tokens.read(out) == tokens
    assert not [p for p in tmp_path.rglob("*.jinja")]
    alone = SpecialTokens(eos=(4,), chat_templates={"default": "new"})
    special_tokens.write(out, alone, folder / "tokenizer.json")
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "new"
    special_tokens.write(out, SpecialTokens(), folder / "tokenizer.json")
    assert set(contents(out)) == {"tokenizer.json", "tokenizer_config.json"}


def test_without_a_tokenizer_only_ids_are_written(tmp_path):
    assert special_tokens.write(tmp_path, SpecialTokens()) == []
    special_tokens.write(tmp_path, SpecialTokens(bos=1, eos=(0, 2), names={"bos_token": "b"}))
    assert set(contents(tmp_path)) == {"generation_config.json"}
    assert special_tokens.read(tmp_path) == SpecialTokens(bos=1, eos=(0, 2))


def test_what_one_does_not_know_another_does():
    own = SpecialTokens(bos=0, names={"bos_token": "a"})
    other = SpecialTokens(1, (2,), None, {"bos_token": "b", "eos_token": "c"}, {"default": "t"})
    names = {"bos_token": "a", "eos_token": "c"}
    assert own.filled(other) == SpecialTokens(0, (2,), None, names, {"default": "t"})


def test_files_that_are_no_json_are_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="generation_config.json must be a JSON object"):
        special_tokens.read(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")  # who needs it opens it, and says so
    (tmp_path / "config.json").write_text('{"bos_token_id": 1}')
    assert special_tokens.read(tmp_path) == SpecialTokens(bos=1)


def tokenizer_with(folder, *added, **fields):
    """A real tokenizer.json whose words stand apart by spaces; only `added` are never cut."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(added))
    put(folder, **fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ids(path, text):
    return tokenizers.Tokenizer.from_file(str(path)).encode(text).ids


def test_tokens_that_are_named_are_never_cut(tmp_path):
    path = tokenizer_with(tmp_path / "a", "<s>", tokenizer_config={"bos_token": "<s>"})
    assert special_tokens.completed(path) == path
    described = PLAIN | {"bos_token": "<s>", "eos_token": "<turn>", "pad_token": "[PAD]", "x": 1}
    described["extra_special_tokens"] = ["<tool>"]
    path = tokenizer_with(tmp_path / "b", "<s>", tokenizer_config=described)
    assert ids(path, "b<turn>b") == [0]
    done = special_tokens.completed(path)
    assert done != path and ids(done, "b<turn>b<s>[PAD]<tool>") == [1, 4, 1, 2, 6, 7]
    found = special_tokens.read(done.parent)
    assert (found.bos, found.eos, found.pad) == (2, (4,), 6)  # the pad token has an id now
    assert json.loads((done.parent / "tokenizer_config.json").read_text()) == described
    assert special_tokens.completed(done) == done and special_tokens.completed(path) == done
    path = tokenizer_with(tmp_path / "c", "<s>", tokenizer_config=described | {"x": 2})
    assert special_tokens.completed(path) != done


def test_tokens_that_are_listed_are_added_in_their_order(tmp_path):
    listed = {
        "8": {"content": "<late>", "special": True},
        "7": {"content": "<early>", "rstrip": True},
        "2": {"content": "<s>", "special": False, "normalized": False},  # with other options
        "x": 3,
    }
    path = tokenizer_with(tmp_path / "a", "<s>", tokenizer_config={"added_tokens_decoder": listed})
    done = tokenizers.Tokenizer.from_file(str(special_tokens.completed(path)))
    added = done.get_added_tokens_decoder()
    assert {i: t.content for i, t in added.items()} == {2: "<s>", 6: "<early>", 7: "<late>"}
    assert not added[2].special and added[7].special and added[6].rstrip and added[6].normalized
    old = {
        "added_tokens": {"<late>": 7, "<early>": 6},
        "special_tokens_map": {"pad_token": "<late>"},
    }
    path = tokenizer_with(tmp_path / "b", "<s>", **old)
    added = tokenizers.Tokenizer.from_file(str(special_tokens.completed(path)))
    added = added.get_added_tokens_decoder()
    assert {i: t.special for i, t in added.items()} == {2: True, 6: False, 7: True}
    (tmp_path / "b" / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizers file"):
        special_tokens.completed(path)
