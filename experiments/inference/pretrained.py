"""A pretrained model with its tokenizer, as programs need it: to generate, to score, or to go on
from as a run."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import common
from experiments.data import default_config
from experiments.training import restore, run_record, steps
from experiments.training.checkpoints import Checkpoints, TrainState
from seqmodels import checkpoints_io, language_model
from seqmodels.checkpoints_io import architectures, files, own_layout, special_tokens
from seqmodels.text import tokenizers

WORKDIR = "workdir"
_STORED_DTYPES = "stored_dtypes.json"  # in a workdir: Pretrained.dtypes of what it began from
DTYPES = ("float32", "bfloat16", "float16")  # of weights
_WHOLE_TEXT = "<|endoftext|>"  # what separates documents in pretraining, where a vocabulary has it


@dataclasses.dataclass(frozen=True)
class Loaded:
    """found: the weights and configs as they were. tokenizer: its `document_id` is an id that the
    model has."""

    found: checkpoints_io.Pretrained
    model: language_model.LanguageModel
    tokenizer: tokenizers.Tokenizer
    tokenizer_name: str
    document_token: str

    @property
    def params(self):
        """As `found` has them."""
        return self.found.params

    @property
    def stop_tokens(self) -> set[int]:
        """Where the model's text or turn ends: at a document's start, and at its own end tokens."""
        return {self.tokenizer.document_id, *self.found.tokens.eos}

    def with_max_len(self, max_len: int) -> "Loaded":
        """The same with full-attention layers that hold `max_len` tokens; ValueError beyond the
        model's context."""
        found = self.found
        config = checkpoints_io.with_max_len(found.model_config, max_len, found.source)
        found = dataclasses.replace(found, model_config=config)
        return dataclasses.replace(self, found=found, model=found.model)

    def encode(self, text: str) -> list[int]:
        """The ids of a text with the special tokens that the tokenizer's own file puts there."""
        return self.tokenizer.encode(text, special=True).tolist()

    def prompt_tokens(self, prompt: str) -> list[int]:
        """`encode` of a prompt, and one token at least."""
        return self.encode(prompt) or [self.tokenizer.document_id]

    def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "..."}], by the model's chat
        template, up to where its answer begins. Tools and documents: as the template takes them;
        there may be a template for tools.

        Raises ValueError where the model has no template, or it does not take these messages.
        """
        templates = self.found.tokens.chat_templates
        name = (
            "tool_use" if tools is not None and "tool_use" in templates else special_tokens.DEFAULT
        )
        if not templates:
            raise ValueError(f"{self.found.source} has no chat template; leave --chat out")
        if name not in templates:
            raise ValueError(f"{self.found.source} has templates for {', '.join(templates)} alone")
        text = render_chat(templates[name], messages, self._special_tokens(), tools, documents)
        return self.tokenizer.encode(text).tolist()

    def _special_tokens(self) -> dict[str, str]:
        return dict(self.found.tokens.names)


def load(source: str, tokenizer: str = "", **options) -> Loaded:
    """The model of `source` with the tokenizer that comes with it, or the given one. Options:
    `load_pretrained`'s.

    Raises ValueError for the folder of a run, and where there is no tokenizer, or it is of another
    vocabulary.
    """
    if (Path(source) / "checkpoints").is_dir():
        raise ValueError(f"{source} is the folder of a run: give it as --workdir")
    return with_tokenizer(checkpoints_io.load_pretrained(source, **options), tokenizer)


def with_tokenizer(found: checkpoints_io.Pretrained, tokenizer: str = "") -> Loaded:
    """`load`, of what is loaded already."""
    found = _with_given(found, tokenizer)
    name = str(found.tokenizer_path or "")
    if not name and _is_of_bytes(found):
        name = tokenizers.BYTES
    if not name:
        raise ValueError(
            f"{found.source} has no tokenizer.json; give the path of one with --tokenizer, or 'bytes'"
        )
    token = found.hf_config.get("document_token")
    if not isinstance(token, str):
        token = "" if name == tokenizers.BYTES else _document_token(name, found)
    text = tokenizers.make_tokenizer(name, token)
    if text.document_id >= found.model_config["vocab_size"]:
        raise ValueError(
            f"documents begin with token {text.document_id} of the tokenizer {name}, and the model {found.source} "
            f"has {found.model_config['vocab_size']} tokens: it is another model's"
        )
    return Loaded(found, found.model, text, name, token)


def _is_of_bytes(found: checkpoints_io.Pretrained) -> bool:
    return found.hf_config.get("tokenizer") == tokenizers.BYTES


def _with_given(found: checkpoints_io.Pretrained, tokenizer: str) -> checkpoints_io.Pretrained:
    """The model with a tokenizer that a user gives, 'bytes' or the path of a file; with its own
    where none is given.

    Raises ValueError for one that is another model's.
    """
    if not tokenizer:
        return found
    vocab_size, path = found.model_config["vocab_size"], Path(tokenizer).expanduser()
    if tokenizer == tokenizers.BYTES:
        check_vocabulary(tokenizers.ByteTokenizer.vocab_size, tokenizer, vocab_size, found.source)
        own = found.hf_config | {"tokenizer": tokenizer, "document_token": ""}
        return dataclasses.replace(found, hf_config=own, tokenizer_path=None)
    check_vocabulary(_open(str(path)).get_vocab_size(), tokenizer, vocab_size, found.source)
    path = special_tokens.completed(path)
    tokens = found.tokens.filled(special_tokens.read(path.parent))
    return dataclasses.replace(found, tokenizer_path=path, tokens=tokens)


def check_vocabulary(size: int, name: str, vocab_size: int, source: str) -> None:
    """Raises ValueError if a tokenizer of `size` ids has so many more, or fewer, than the model
    that it must be another's.

    Models round their vocabularies up, and tokenizers get a token or two that the model never
    learned: a tenth, or 256 ids, is allowed for. An id that the model has not is refused where it
    comes up.
    """
    if abs(size - vocab_size) > max(vocab_size // 10, 256):
        raise ValueError(
            f"the tokenizer {name} has {size} ids and the model {source} {vocab_size}: "
            "it is another model's"
        )


def render_chat(template: str, messages, special: Mapping[str, str], tools=None, documents=None):
    """`chat_templates.render`; ValueError where jinja2 is not installed."""
    from seqmodels.text import chat_templates  # an extra

    return chat_templates.render(template, messages, special, tools, documents)


def layouts() -> list[str]:
    """What `write` can write."""
    return [WORKDIR, own_layout.MODEL_TYPE, *architectures.names()]


def find(source: str, **options) -> checkpoints_io.Pretrained:
    """What `source` holds: as `load_pretrained` takes it, with its options, or the workdir of a
    run: its latest checkpoint, in the dtypes that it was trained in."""
    if not (Path(source) / "checkpoints").is_dir():
        return checkpoints_io.load_pretrained(source, **options)
    config = run_record.load_config(Path(source))
    config.mesh = dict.fromkeys(config.mesh, 1)  # one device holds it here, wherever it was trained
    program = steps.build(config, config.data.get("seq_len", 8), jax.devices()[:1])
    _, params = restore.evaluation_params(program, config, Path(source))
    found = of_run(config, params, source)
    model = checkpoints_io.with_max_len(found.model_config, options.get("max_len"), source)
    return dataclasses.replace(found, model_config=model)


def of_run(config, params, workdir: str) -> checkpoints_io.Pretrained:
    """The model of a run with these parameters, and what it knows of tokens.

    What stands beside its tokenizer counts, as in any folder; a text begins and ends with the run's
    document token where that says nothing.
    """
    kept = {"model_type": own_layout.MODEL_TYPE}
    name, path, tokens = config.data.get("tokenizer"), None, checkpoints_io.SpecialTokens()
    if name is not None:
        kept |= {"document_token": config.data.document_token}
        kept |= {"tokenizer": name} if name == tokenizers.BYTES else {}
        path = None if name == tokenizers.BYTES else Path(name).expanduser()
        start = tokenizers.make_tokenizer(name, config.data.document_token).document_id
        ends = checkpoints_io.SpecialTokens(bos=start, eos=(start,))
        tokens = special_tokens.read(path.parent if path else Path(workdir)).filled(ends)
    stored = Path(workdir) / _STORED_DTYPES
    dtypes = files.read_json(stored) if stored.is_file() else {}
    return checkpoints_io.Pretrained(
        config.model.to_dict(), params, kept, workdir, path, tokens, dtypes
    )


def write(
    found: checkpoints_io.Pretrained,
    layout: str,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: str = "",
    max_shard_bytes: int = files.MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes a model to the folder `out` in one of `layouts`; returns what was written.

    dtype: of the tensors, but for what models keep in float32, such as decays; None is what they
      had, or those that a run began from. A workdir's are float32. tokenizer: the path of a file,
      or 'bytes', where the model came without one.
    Raises ValueError, before anything is written, for a tokenizer that is not the model's.
    """
    if layout == WORKDIR:
        return [write_workdir(out, with_tokenizer(found, tokenizer)), out / "config.json"]
    found = _with_given(found, tokenizer)
    hf_config, path = dict(found.hf_config), found.tokenizer_path
    if layout != own_layout.MODEL_TYPE and not path and _is_of_bytes(found):
        path = special_tokens.keep(tokenizers.bytes_as_file(), found.tokens)
        hf_config["document_token"] = _WHOLE_TEXT
    return checkpoints_io.save_pretrained(
        out,
        found.model_config,
        found.params,
        architecture=layout,
        dtype=dtype or found.dtypes,
        hf_config=hf_config,
        tokenizer_path=path,
        tokens=found.tokens,
        max_shard_bytes=max_shard_bytes,
    )


def write_workdir(workdir: Path, loaded: Loaded) -> Path:
    """A run at step 0 with these weights: what train, evaluate and generate take. Returns the
    checkpoint's folder.

    Its config has this model and tokenizer, AdamW at 1e-5, and python_stdlib as data; every field
    can be overridden. Parameters are float32, whatever they were stored in: a step of training is
    smaller than what bfloat16 can add to most of them. Activations keep the model's dtype, and
    `find` the stored ones for an export.
    """
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run already; give another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    config = common.get_config()
    config.model = dict(loaded.found.model_config) | {"param_dtype": "float32"}
    config.data = default_config("python_stdlib")
    config.data.update(
        {"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token}
    )
    own = loaded.found.tokenizer_path
    special_tokens.write(workdir, loaded.found.tokens, own)
    if own is not None:
        config.data.tokenizer = str(workdir.absolute() / special_tokens.TOKENIZER_FILE)
    config.optimizer.learning_rate = 1e-5
    if positions := loaded.model.learned_positions:
        config.data.seq_len = min(config.data.seq_len, positions)
        config.sample.length = min(config.sample.length, positions)
    steps.build(config, config.data.seq_len)  # raises for what cannot be run
    checkpoints = Checkpoints(workdir)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), loaded.params)
    checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, ()), NothingRead())
    checkpoints.close()
    run_record.write_json(workdir / _STORED_DTYPES, dict(loaded.found.dtypes))
    run_record.save_config(workdir, config)
    return checkpoints.path(0)


class NothingRead:
    """The data position of a run that has not begun, whatever its data will be."""

    def get_state(self):
        return {}


def _document_token(path: str, found: checkpoints_io.Pretrained) -> str:
    """The token that stands before documents: what separated them in pretraining, as far as the
    files tell."""
    file, tokens = _open(path), found.tokens
    candidates = [file.token_to_id(_WHOLE_TEXT), tokens.bos, *tokens.eos]
    for i in candidates:
        if i is not None and i < found.model_config["vocab_size"] and file.id_to_token(i):
            return file.id_to_token(i)
    raise ValueError(
        f"{path}: no token is known to separate documents; the files beside it name none"
    )


_open = functools.lru_cache(maxsize=2)(tokenizers.open_file)
