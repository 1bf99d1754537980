"""A pretrained model with its tokenizer, as programs need it: to generate, to score, or to go on from as a run."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import common
from experiments import restore, run_record, steps
from experiments.checkpoints import Checkpoints, TrainState
from experiments.data import default_config, tokenizers
from seqmodels import checkpoints_io, language_model
from seqmodels.checkpoints_io import architectures, files, own_layout

WORKDIR = "workdir"
DTYPES = ("float32", "bfloat16", "float16")  # of weights
_WHOLE_TEXT = "<|endoftext|>"  # what separates documents in pretraining, where a vocabulary has it


@dataclasses.dataclass(frozen=True)
class Loaded:
    """found: the weights and configs as they were. tokenizer: its `document_id` is an id that the model has."""

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
        """Where the model's text ends: a document's start, and its end-of-text tokens."""
        eos = self.found.hf_config.get("eos_token_id")
        ends = eos if isinstance(eos, list) else [eos]
        return {self.tokenizer.document_id} | {i for i in ends if type(i) is int}

    def with_max_len(self, max_len: int) -> "Loaded":
        """The same with full-attention layers that hold `max_len` tokens; ValueError beyond the model's context."""
        found = self.found
        config = checkpoints_io.with_max_len(found.model_config, max_len, found.source)
        found = dataclasses.replace(found, model_config=config)
        return dataclasses.replace(self, found=found, model=found.model)

    def encode(self, text: str) -> list[int]:
        """The ids of a text with the special tokens that the tokenizer's own file puts there."""
        return self._encode(text, special=True)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """`encode` of a prompt, and one token at least."""
        return self.encode(prompt) or [self.tokenizer.document_id]

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation, [{"role": "user", "content": "..."}], by the model's chat template, up to where its answer
        begins.

        Raises ValueError where the model has no template, or it does not take these messages.
        """
        template = self.found.chat_template
        if template is None:
            raise ValueError(f"{self.found.source} has no chat template; leave --chat out")
        return self._encode(render_chat(template, messages, self._special_tokens()), special=False)

    def _special_tokens(self) -> dict[str, str]:
        if self.tokenizer_name == tokenizers.BYTES:
            return {}
        file = _open(self.tokenizer_name)
        ids = {name: checkpoints_io.token_id(self.found.hf_config, name) for name in ("bos", "eos")}
        return {f"{n}_token": file.id_to_token(i) or "" for n, i in ids.items() if i is not None}

    def _encode(self, text: str, special: bool) -> list[int]:
        if self.tokenizer_name == tokenizers.BYTES:
            return [self.tokenizer.document_id, *map(int, self.tokenizer.encode(text))]
        return _open(self.tokenizer_name).encode(text, add_special_tokens=special).ids


def load(source: str, tokenizer: str = "", **options) -> Loaded:
    """The model of `source` with the tokenizer that comes with it, or the given one. Options: `load_pretrained`'s.

    Raises ValueError for the folder of a run, and where there is no tokenizer, or it is of another vocabulary.
    """
    if (Path(source) / "checkpoints").is_dir():
        raise ValueError(f"{source} is the folder of a run: give it as --workdir")
    return with_tokenizer(checkpoints_io.load_pretrained(source, **options), tokenizer)


def with_tokenizer(found: checkpoints_io.Pretrained, tokenizer: str = "") -> Loaded:
    """`load`, of what is loaded already."""
    name = tokenizer or str(found.tokenizer_path or "")
    if not name and found.hf_config.get("tokenizer") == tokenizers.BYTES:
        name = tokenizers.BYTES
    if not name:
        raise ValueError(
            f"{found.source} has no tokenizer.json; give the path of one with --tokenizer, or 'bytes'"
        )
    _check_tokenizer(name, found)  # before a document token is looked for in another model's
    token = found.hf_config.get("document_token")
    if not isinstance(token, str):
        token = "" if name == tokenizers.BYTES else _document_token(name, found.hf_config)
    text = tokenizers.make_tokenizer(name, token)
    check_vocabulary(text.vocab_size, name, found.model_config["vocab_size"], found.source)
    return Loaded(found, found.model, text, name, token)


def _check_tokenizer(name: str, found: checkpoints_io.Pretrained) -> None:
    bytes_alone = name == tokenizers.BYTES
    size = tokenizers.ByteTokenizer.vocab_size if bytes_alone else _open(name).get_vocab_size()
    check_vocabulary(size, name, found.model_config["vocab_size"], found.source)


def check_vocabulary(size: int, name: str, vocab_size: int, source: str) -> None:
    """Raises ValueError if a tokenizer of `size` ids has some that the model has not, or so few that it must be another's.

    Models round their vocabularies up: a tenth, or 256 ids, is allowed for.
    """
    if not vocab_size - max(vocab_size // 10, 256) <= size <= vocab_size:
        raise ValueError(
            f"the tokenizer {name} has {size} ids and the model {source} {vocab_size}: "
            "it is another model's"
        )


def render_chat(template: str, messages: Sequence[dict[str, str]], special: dict[str, str]) -> str:
    """The text of a conversation by a Jinja template, in a sandbox: a template is a part of somebody's file."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise ValueError("chat templates need jinja2: pip install 'seqmodels[gguf]'") from error

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special
        )
    except Exception as error:  # whatever the template makes happen
        raise ValueError(f"the model's chat template cannot be rendered: {error}") from error


def layouts() -> list[str]:
    """What `write` can write."""
    return [WORKDIR, own_layout.MODEL_TYPE, *architectures.names()]


def find(source: str, **options) -> checkpoints_io.Pretrained:
    """What `source` holds: as `load_pretrained` takes it, with its options, or the workdir of a run: its latest checkpoint."""
    if not (Path(source) / "checkpoints").is_dir():
        return checkpoints_io.load_pretrained(source, **options)
    config = run_record.load_config(Path(source))
    config.mesh = dict.fromkeys(config.mesh, 1)  # one device holds it here, wherever it was trained
    program = steps.build(config, config.data.get("seq_len", 8), jax.devices()[:1])
    _, params = restore.evaluation_params(program, config, Path(source))
    name = config.data.get("tokenizer")
    is_file = name not in (None, tokenizers.BYTES)
    kept = {"model_type": own_layout.MODEL_TYPE}
    if name is not None:
        kept |= {"document_token": config.data.document_token}
        kept |= {} if is_file else {"tokenizer": name}
    path = Path(name) if is_file else None
    return checkpoints_io.Pretrained(config.model.to_dict(), params, kept, source, path)


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

    dtype: of the tensors; None is what they had. tokenizer: the path of a file, or 'bytes', where the model came without one.
    Raises ValueError, before anything is written, for a tokenizer that is not the model's.
    """
    if layout == WORKDIR:
        return [write_workdir(out, with_tokenizer(found, tokenizer)), out / "config.json"]
    hf_config, path = dict(found.hf_config), tokenizer or found.tokenizer_path
    if tokenizer:
        _check_tokenizer(tokenizer, found)
    if tokenizer == tokenizers.BYTES:
        hf_config, path = hf_config | {"tokenizer": tokenizer}, None
    return checkpoints_io.save_pretrained(
        out,
        found.model_config,
        found.params,
        architecture=layout,
        dtype=dtype or found.dtypes,
        hf_config=hf_config,
        tokenizer_path=path,
        chat_template=found.chat_template,
        max_shard_bytes=max_shard_bytes,
    )


def write_workdir(workdir: Path, loaded: Loaded) -> Path:
    """A run at step 0 with these weights: what train, evaluate and generate take. Returns the checkpoint's folder.

    Its config has this model and tokenizer, AdamW at 1e-5, and python_stdlib as data; every field can be overridden.
    """
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run already; give another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    config = common.get_config()
    config.model = dict(loaded.found.model_config)
    config.data = default_config("python_stdlib")
    config.data.update(
        {"tokenizer": loaded.tokenizer_name, "document_token": loaded.document_token}
    )
    if loaded.tokenizer_name != tokenizers.BYTES:
        own = workdir.absolute() / "tokenizer.json"
        own.write_bytes(Path(loaded.tokenizer_name).read_bytes())
        config.data.tokenizer = str(own)
    config.optimizer.learning_rate = 1e-5
    if positions := loaded.model.learned_positions:
        config.data.seq_len = min(config.data.seq_len, positions)
        config.sample.length = min(config.sample.length, positions)
    steps.build(config, config.data.seq_len)  # raises for what cannot be run
    checkpoints = Checkpoints(workdir)
    checkpoints.save(TrainState(jnp.zeros((), jnp.int32), loaded.params, ()), NothingRead())
    checkpoints.close()
    run_record.save_config(workdir, config)
    return checkpoints.path(0)


class NothingRead:
    """The data position of a run that has not begun, whatever its data will be."""

    def get_state(self):
        return {}


def _document_token(path: str, hf_config: dict[str, Any]) -> str:
    """The token that stands before documents: what separated them in pretraining, as far as the files tell."""
    file = _open(path)
    if file.token_to_id(_WHOLE_TEXT) is not None:
        return _WHOLE_TEXT
    for name in ("bos", "eos"):
        i = checkpoints_io.token_id(hf_config, name)
        if i is not None and (token := file.id_to_token(i)) is not None:
            return token
    raise ValueError(f"{path}: no token is known to separate documents; config.json names none")


@functools.lru_cache(maxsize=2)
def _open(path: str):
    import tokenizers as library

    try:
        return library.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path!r} is no tokenizers file (tokenizer.json): {error}") from error
