"""A pretrained model with its tokenizer, as programs need it: to generate, to score, or to go on from as a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import run_record, steps
from experiments.checkpoints import Checkpoints, TrainState
from experiments.data import default_config, make_dataset, tokenizers
from seqmodels import checkpoints_io, language_model

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

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the tokenizer's own file puts there; one at least."""
        return self._encode(prompt, special=True) or [self.tokenizer.document_id]

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
        ids = {name: self.found.hf_config.get(f"{name}_id") for name in ("bos_token", "eos_token")}
        if self.tokenizer_name == tokenizers.BYTES:
            return {}
        file = _open(self.tokenizer_name)
        return {n: file.id_to_token(i) or "" for n, i in ids.items() if type(i) is int and i >= 0}

    def _encode(self, text: str, special: bool) -> list[int]:
        if self.tokenizer_name == tokenizers.BYTES:
            return [self.tokenizer.document_id, *map(int, self.tokenizer.encode(text))]
        return _open(self.tokenizer_name).encode(text, add_special_tokens=special).ids


def load(source: str, tokenizer: str = "", **options) -> Loaded:
    """The model of `source` with the tokenizer that comes with it, or the given one. Options: `load_pretrained`'s.

    Raises ValueError where there is no tokenizer, or it is of another vocabulary.
    """
    return with_tokenizer(checkpoints_io.load_pretrained(source, **options), tokenizer)


def with_tokenizer(found: checkpoints_io.Pretrained, tokenizer: str = "") -> Loaded:
    """`load`, of what is loaded already."""
    name = tokenizer or str(found.tokenizer_path or found.hf_config.get("tokenizer") or "")
    if not name:
        raise ValueError(
            f"{found.source} has no tokenizer.json; give the path of one with --tokenizer, or 'bytes'"
        )
    token = found.hf_config.get("document_token")
    if token is None:
        token = "" if name == tokenizers.BYTES else _document_token(name, found.hf_config)
    text = tokenizers.make_tokenizer(name, token)
    check_vocabulary(text, name, found.model_config["vocab_size"], found.source)
    return Loaded(found, found.model, text, name, token)


def check_vocabulary(tokenizer, name: str, vocab_size: int, source: str) -> None:
    """Raises ValueError if a tokenizer has ids that the model has not, or so few that it must be another's.

    Models round their vocabularies up, a few hundred ids at most.
    """
    if not 0.9 * vocab_size <= tokenizer.vocab_size <= vocab_size:
        raise ValueError(
            f"the tokenizer {name} has {tokenizer.vocab_size} ids and the model {source} {vocab_size}: "
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
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"the model's chat template cannot be rendered: {error}") from error


def write_workdir(workdir: Path, loaded: Loaded, data: dict[str, Any] | None = None) -> Path:
    """A run at step 0 with these weights: what train, evaluate and generate take. Returns the checkpoint's folder.

    data: options of `python_stdlib`'s that differ, or another dataset's, with its name.
    """
    from configs import common

    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run already; give another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    config = common.get_config()
    config.model = dict(loaded.found.model_config)
    config.data = default_config((data or {}).get("name", "python_stdlib"))
    config.data.update({"tokenizer": loaded.tokenizer_name} | dict(data or {}))
    config.data.document_token = loaded.document_token
    if loaded.tokenizer_name != tokenizers.BYTES:
        own = workdir.absolute() / "tokenizer.json"
        own.write_bytes(Path(loaded.tokenizer_name).read_bytes())
        config.data.tokenizer = str(own)
    config.optimizer.learning_rate = 1e-5
    program = steps.build(config, config.data.seq_len)
    state = _start(program, loaded.params)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, iter(make_dataset(config.data, "train")))
    checkpoints.close()
    run_record.save_config(workdir, config)
    return checkpoints.path(0)


def _start(program: steps.Program, params) -> TrainState:
    """The state before the first step, with these parameters; AdamW's own starts at zero."""
    abstract = program.abstract_state
    placed = jax.tree.map(
        lambda p, a: jax.device_put(p.astype(a.dtype), a.sharding), params, abstract.params
    )
    zeros = jax.tree.map(
        lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), abstract.opt_state
    )
    return TrainState(jnp.zeros((), jnp.int32), placed, zeros)


def _document_token(path: str, hf_config: dict[str, Any]) -> str:
    """The token that stands before documents: what separated them in pretraining, as far as the files tell."""
    file = _open(path)
    if file.token_to_id(_WHOLE_TEXT) is not None:
        return _WHOLE_TEXT
    for name in ("bos_token_id", "eos_token_id"):
        i = hf_config.get(name)
        i = i[0] if isinstance(i, list) and i else i
        if type(i) is int and i >= 0 and (token := file.id_to_token(i)) is not None:
            return token
    raise ValueError(f"{path}: no token is known to separate documents; config.json names none")


def _open(path: str):
    import tokenizers as library

    return library.Tokenizer.from_file(path)
