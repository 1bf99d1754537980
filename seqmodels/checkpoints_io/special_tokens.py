"""Reads and writes what a model's files say about tokens: which ids begin and end a text, and how
conversations are formatted.

    generation_config.json   bos_token_id, pad_token_id, and eos_token_id: the end of a text, or a
      list with the ends of turns
    config.json              the same fields
    tokenizer_config.json    "bos_token": "<s>" and so on, and chat_template: Jinja, or several by
      name
    special_tokens_map.json  in folders of older programs, what tokenizer_config.json leaves out
    chat_template.jinja, additional_chat_templates/<name>.jinja

As in transformers, the first file in this list that has an id counts, and then the texts in
tokenizer_config.json. Runs and GGUF files are read the same way: a run keeps these files beside its
tokenizer.json, and a GGUF file's metadata is written as such files.

Tokens that tokenizer_config.json (in folders of older programs added_tokens.json) lists or names
are added to tokenizer.json's own added tokens, which are never cut.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels_pallas.dispatch import verification
from seqmodels.checkpoints_io import files

TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_GENERATION_CONFIG = "generation_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT = "default"  # the template of a conversation without tools
_PLAIN = "PreTrainedTokenizerFast"
# transformers' tokenizer classes that have no special tokens but those they are told; other classes
# have a bos and an eos token.
_TOLD_ALONE = (_PLAIN, "TokenizersBackend")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Special tokens and chat templates of a model.

    bos, pad: ids of the tokens that begin a text and that pad, or None.
    eos: every id that ends a text or a turn; the end of a text comes first.
    names: texts that chat templates are given, such as {"bos_token": "<s>"}.
    chat_templates: {name: Jinja template}. "default" formats a conversation, "tool_use", if it is
      there, one with tools.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ids(self) -> dict[str, int | list[int]]:
        """Returns the ids that are set, as fields of config.json and generation_config.json."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        fields = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}
        return {name: value for name, value in fields.items() if value is not None}

    def filled(self, other: "SpecialTokens") -> "SpecialTokens":
        """Returns a copy in which fields that are not set, and further names, are those of
        `other`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        known = {name: value for name, value in own.items() if value not in (None, (), {})}
        return dataclasses.replace(other, **known | {"names": {**other.names, **self.names}})


def read(folder: Path, config: Mapping[str, Any] | None = None) -> SpecialTokens:
    """Returns the special tokens and chat templates that the files in `folder` describe.

    config: the fields of config.json, if it is not in this folder. Files may be absent; one that is
      no JSON object raises a ValueError that names it.
    """
    generation = _fields(folder / _GENERATION_CONFIG)
    config = _fields(folder / "config.json") if config is None else config
    described = _described(folder)
    vocabulary = functools.cache(lambda: _vocabulary(folder / TOKENIZER_FILE))
    names, ids = _names(described), {}
    for name in ("bos", "eos", "pad"):
        field = f"{name}_token_id"
        ids[name] = _ids(generation.get(field)) or _ids(config.get(field))
        if not ids[name] and f"{name}_token" in names:
            ids[name] = _ids(vocabulary().get(names[f"{name}_token"]))
    bos, pad = (next(iter(ids[name]), None) for name in ("bos", "pad"))
    templates = _chat_templates(folder, described)
    tokens = SpecialTokens(bos, ids["eos"], pad, names, templates)
    # A tokenizer class of its own has a bos and an eos token, named by their ids.
    if described.get("tokenizer_class", _PLAIN) in _TOLD_ALONE:
        return tokens
    own = {k: text for k, text in _names_by_id(tokens, vocabulary()).items() if k not in described}
    return dataclasses.replace(tokens, names=own | names)


def write(folder: Path, tokens: SpecialTokens, tokenizer: Path | None = None) -> list[Path]:
    """Writes special tokens and chat templates as the files that `read` reads, without config.json.

    tokenizer: a tokenizer.json to copy, with the files beside it, changed where `tokens` differs
      from them. None writes only generation_config.json: there is no tokenizer to describe.

    Returns the paths of the files.
    """
    beside = tokenizer.parent if tokenizer else None
    said = _fields(beside / _GENERATION_CONFIG) if beside else {}
    ids = {k: v for k, v in tokens.ids().items() if _ids(said.get(k)) != _ids(v)}
    # Ids go to generation_config.json; all else describes a tokenizer.
    paths = _put(folder, _GENERATION_CONFIG, said | ids, beside)
    if tokenizer is None or beside is None:
        return paths
    paths += _copy(tokenizer, folder / TOKENIZER_FILE)
    described, kept = _described(beside), _template_files(beside)
    known, names = _names(described), dict(tokens.names)
    if not described:  # nothing names them yet
        names = _names_by_id(tokens, _vocabulary(tokenizer)) | names
    changed: dict[str, Any] = {k: text for k, text in names.items() if known.get(k) != text}
    # Other templates than those beside the tokenizer go to tokenizer_config.json, and files of
    # templates are not copied.
    if tokens.chat_templates != _chat_templates(beside, described):
        named = [{"name": name, "template": text} for name, text in tokens.chat_templates.items()]
        alone = set(tokens.chat_templates) == {DEFAULT}
        kept, changed["chat_template"] = {}, named[0]["template"] if alone else named
    plain = {"tokenizer_class": _PLAIN, "clean_up_tokenization_spaces": False}
    paths += _put(folder, _TOKENIZER_CONFIG, (described or plain) | changed, beside)
    # Read files to copy before files of another model, perhaps the same ones, are removed.
    copies = {folder / p.relative_to(beside): p.read_bytes() for p in kept.values()}
    replaced = list(_template_files(folder).values())
    if folder.resolve() != beside.resolve():
        replaced += [folder / _SPECIAL_TOKENS_MAP, folder / _ADDED_TOKENS]
    for path in replaced:
        path.unlink(missing_ok=True)
    for path, data in copies.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return [*paths, *copies]


def completed(tokenizer: Path) -> Path:
    """Returns a tokenizer.json with all tokens that the files beside `tokenizer` name.

    That is `tokenizer` itself or, if it lacks some, a copy in the cache with these added.
    """
    lacking = _lacking(tokenizer)
    if not lacking:
        return tokenizer
    from tokenizers import AddedToken, Tokenizer

    try:
        library = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{tokenizer} is no tokenizers file: {error}") from error
    library.add_tokens([AddedToken(**token) for token in lacking])
    return keep(library.to_str(), read(tokenizer.parent), tokenizer)


def keep(text: str, tokens: SpecialTokens, like: Path | None = None) -> Path:
    """Stores a tokenizer.json in the cache, with files that describe `tokens`; returns its path.

    text: content of the tokenizer.json. like: the tokenizer.json that it was made from; the files
    beside that one are kept, as in `write`.
    """
    folders = verification.cache_folder() / "tokenizers"
    folders.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folders) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        path = made / TOKENIZER_FILE
        path.write_text(text, encoding="utf-8")
        paths = write(made, tokens, like or path)
        path.write_text(text, encoding="utf-8")  # a copy of `like` until now
        contents = [(str(p.relative_to(made)), p.read_bytes()) for p in sorted(paths)]
        folder = folders / hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
        if not folder.is_dir():
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder / TOKENIZER_FILE


def _put(folder: Path, name: str, fields: dict[str, Any], beside: Path | None) -> list[Path]:
    """Writes `fields` to the JSON file `name`, or copies the one in `beside` if it has the same."""
    if beside and fields and _fields(beside / name) == fields:
        return _copy(beside / name, folder / name)
    if not fields:
        (folder / name).unlink(missing_ok=True)
        return []
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return [folder / name]


def _copy(source: Path, target: Path) -> list[Path]:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    return [target]


def _fields(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _described(folder: Path) -> dict[str, Any]:
    """Returns the fields of tokenizer_config.json and, where it lists no added tokens, those of
    special_tokens_map.json."""
    described = _fields(folder / _TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in described:
        described |= _typed(_fields(folder / _SPECIAL_TOKENS_MAP))
    return described


def _typed(value: Any) -> Any:
    """Returns tokens of special_tokens_map.json in the form that tokenizer_config.json has."""
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = {"__type": "AddedToken"} if "content" in value else {}
    return kind | {k: _typed(v) for k, v in value.items()}


def _named(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: special token}; a name is "bos_token", a token a text or an object."""
    extra = described.get("extra_special_tokens")
    named = {k: v for k, v in described.items() if k.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {k: v for k, v in named.items() if isinstance(_text(v), str)}


def _names(described: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: text of a special token}, such as {"bos_token": "<s>"}."""
    return {k: _text(v) for k, v in _named(described).items()}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _lacking(tokenizer: Path) -> list[dict[str, Any]]:
    """Returns options of tokens listed beside a tokenizer.json that it lacks or has differently."""
    described = _described(tokenizer.parent)
    named = list(_named(described).values())
    for field in ("extra_special_tokens", "additional_special_tokens"):
        named += described[field] if isinstance(described.get(field), list) else []
    # Tokens with options are in tokenizer_config.json, or in older folders without them in
    # added_tokens.json.
    listed = described.get("added_tokens_decoder")
    if isinstance(listed, dict):
        numbered = [(i, token) for i, token in listed.items() if i.isdecimal()]
        listed = [token for _, token in sorted(numbered, key=lambda pair: int(pair[0]))]
    else:
        ids = _fields(tokenizer.parent / _ADDED_TOKENS)
        ids = {token: i for token, i in ids.items() if type(i) is int}
        special = set(map(_text, named))
        listed = [
            {"content": t, "special": t in special} for t in sorted(ids, key=lambda t: ids[t])
        ]
    if not named and not listed:
        return []
    try:
        own = list(map(_options, json.loads(tokenizer.read_bytes())["added_tokens"]))
    except (ValueError, LookupError, TypeError):
        return []  # opening what is no tokenizer raises elsewhere
    lacking = [token for token in map(_options, listed) if token and token not in own]
    known = {token.get("content") for token in own + lacking}
    for token in map(_options, ({"content": _text(t), "special": True} for t in named)):
        if token and token["content"] not in known:
            known.add(token["content"])
            lacking.append(token)
    return lacking


def _options(token: Any) -> dict[str, Any]:
    """Returns an added token's options for the `tokenizers` library, or {} if it is malformed."""
    if (
        not isinstance(token, dict)
        or not isinstance(token.get("content"), str)
        or not token["content"]
    ):
        return {}
    special = token.get("special") is True
    flags = {k: token.get(k) is True for k in ("single_word", "lstrip", "rstrip")}
    normalized = token.get("normalized", not special) is True
    return {"content": token["content"], "special": special, "normalized": normalized} | flags


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in values if type(i) is int and i >= 0))


def _vocabulary(path: Path) -> dict[str, int]:
    """Returns {text: id} of a tokenizer.json's tokens, or {} if that file is broken."""
    try:
        fields = json.loads(path.read_bytes())
        words = fields["model"]["vocab"]
        if isinstance(words, list):  # Unigram's, with scores
            words = {text: i for i, (text, _) in enumerate(words)}
        return words | {token["content"]: token["id"] for token in fields["added_tokens"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _names_by_id(tokens: SpecialTokens, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """Returns the texts of the bos and eos tokens, by the names of tokenizer_config.json."""
    ids = {"bos_token": tokens.bos, "eos_token": next(iter(tokens.eos), None)}
    texts = {i: text for text, i in vocabulary.items()}
    return {name: texts[i] for name, i in ids.items() if i in texts}


def _template_files(folder: Path) -> dict[str, Path]:
    found = {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    default = folder / _TEMPLATE_FILE
    return {DEFAULT: default} | found if default.is_file() else found


def _chat_templates(folder: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: Jinja template} from .jinja files, or else from tokenizer_config.json."""
    if paths := _template_files(folder):
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    found = described.get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in entries}
    templates = found if isinstance(found, dict) else {DEFAULT: found}
    pairs = templates.items()
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
