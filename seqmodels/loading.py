"""Loads a language model with its tokenizer from any source, to generate and score text."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels import checkpoints_io, language_model
from seqmodels.checkpoints_io import runs, special_tokens
from seqmodels.text import sampling, scoring, tokenizers

DTYPES = ("float32", "bfloat16", "float16")  # of weights
WHOLE_TEXT = "<|endoftext|>"  # separates documents in pretraining, where a vocabulary has it
_LEAST_ROOM = 256  # tokens of a full-attention cache

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A language model with its parameters and tokenizer, which generates and scores text.

    Attributes:
      found: the parameters, configs and special tokens that the source holds.
      model: the language model as a Flax module.
      tokenizer: encodes and decodes text (`seqmodels.text.tokenizers`); the id document_id, with
        which documents begin, is in the model's vocabulary.
      tokenizer_name, document_token: the arguments by which `tokenizers.make_tokenizer` makes this
        tokenizer.
      starts_documents: whether prompts begin with document_id, as texts do when a run is trained;
        else they begin with the special tokens that the tokenizer's file puts before a text.
    """

    found: checkpoints_io.Pretrained
    model: language_model.LanguageModel
    tokenizer: tokenizers.Tokenizer
    tokenizer_name: str
    document_token: str
    starts_documents: bool = False

    @property
    def params(self):
        """Returns the model's parameters, in the dtypes they were loaded in."""
        return self.found.params

    @property
    def config(self) -> dict[str, Any]:
        """Returns the model's config, as `language_model.from_config` takes it."""
        return self.found.model_config

    @property
    def stop_tokens(self) -> set[int]:
        """Returns the ids that end a generated text or turn: document_id and the end tokens."""
        return {self.tokenizer.document_id, *self.found.tokens.eos}

    def with_max_len(self, max_len: int) -> "LoadedModel":
        """Returns a copy of this model whose full-attention layers hold max_len tokens in decoding.

        Raises ValueError for more tokens than the model's context.
        """
        found = self.found
        config = checkpoints_io.with_max_len(found.model_config, max_len, found.source)
        found = dataclasses.replace(found, model_config=config)
        return dataclasses.replace(self, found=found, model=found.model)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text at the start of a document.

        They include document_id or special tokens before the text, as `starts_documents` says.
        """
        if self.starts_documents:
            return sampling.prompt_tokens(text, self.tokenizer)
        return self.tokenizer.encode(text, special=True).tolist()

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt at the start of a document, at least one.

        They are those of `encode`, or document_id where these are none.
        """
        return self.encode(prompt) or [self.tokenizer.document_id]

    def chat_tokens(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Returns the token ids of a conversation, written by the model's chat template.

        They end where the model's answer begins.

        Args:
          messages: the conversation, such as [{"role": "user", "content": "..."}].
          tools, documents: JSON schemas of functions, and texts with titles, for the template. With
            tools the template called "tool_use" is used, if there is one.

        Raises:
          ValueError: the model has no chat template, or its template rejects these messages.
        """
        from seqmodels.text import chat_templates  # an extra

        known, source = self.found.tokens, self.found.source
        templates = known.chat_templates
        with_tools = tools is not None and "tool_use" in templates
        name = "tool_use" if with_tools else special_tokens.DEFAULT
        if not templates:
            raise ValueError(f"{source} has no chat template; leave chat out")
        if name not in templates:
            raise ValueError(f"{source} has templates for {', '.join(templates)} alone")
        text = chat_templates.render(templates[name], messages, known.names, tools, documents)
        return self.tokenizer.encode(text).tolist()

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        stream: bool = False,
        batch_size: int = 8,
    ) -> Any:
        """Returns the text with which the model continues a prompt; a list of texts for a list.

        A text ends after max_new_tokens tokens, where the model ends its text or turn, or before
        the first stop string. It depends neither on the other prompts nor on `stream`.

        Args:
          prompt: a text, token ids, a conversation such as [{"role": "user", "content": "..."}],
            which the chat template writes, or a list of these.
          temperature: 0 takes the most likely token, 1 samples from the model's distribution.
          top_k: samples among the k most likely tokens only.
          top_p: samples among the fewest most likely tokens whose probabilities sum to p only.
          seed: fixes the random draws.
          stop: a string, or several, before which a text ends; special tokens such as "<|im_end|>"
            are recognised.
          chat: whether prompts that are texts are questions to an assistant.
          stream: whether an iterator of pieces of text is returned, for several prompts of (index
            of the prompt, piece); joined, the pieces are the text.
          batch_size: number of prompts that are read and continued together, without `stream`.

        Raises:
          ValueError: before anything is computed, for no prompt, ids outside the vocabulary,
            options out of range, more tokens than a full-attention cache or learned positions
            hold, and conversations without a chat template.
        """
        single, prompts = self._ids_of(prompt, chat)
        model = self._with_room(max(map(len, prompts), default=0) + max_new_tokens)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        ends = {"stop": (stop,) if isinstance(stop, str) else stop, "stop_tokens": self.stop_tokens}
        if stream:
            tokens = sampling.stream_batch(model, self.params, prompts, max_new_tokens, **options)
            pieces = sampling.stream_texts(tokens, self.tokenizer, prompts, **ends)
            return (text for _, text in pieces) if single else pieces
        texts = sampling.generate(
            model, self.params, self.tokenizer, prompts, max_new_tokens,
            batch_size=batch_size, **ends, **options,
        )  # fmt: skip
        return texts[0] if single else texts

    def score(self, text: Prompt | Sequence[Prompt]):
        """Returns how likely the model finds a text: (nll_N, correct_N), or a list of those.

        nll_N is -log p (nats) of each token given all tokens before it, and correct_N whether it is
        the most likely token; the text's first token (see `prompt_tokens`) has no score.
        exp(nll_N.mean()) is the perplexity. text: a text, token ids, a conversation, or a list of
        these.
        """
        single, sequences = self._ids_of(text)
        scores = scoring.score(self.model, self.params, sequences)
        return scores[0] if single else scores

    def _ids_of(self, prompt: Any, chat: bool = False) -> tuple[bool, list[list[int]]]:
        """Returns whether `prompt` is one prompt rather than a list, and each prompt's token ids.

        chat: whether prompts that are texts are questions to an assistant.
        """
        single = _is_prompt(prompt)

        def ids(prompt: Any) -> list[int]:
            if isinstance(prompt, str) and not chat:
                return self.prompt_tokens(prompt)
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if len(prompt) and isinstance(prompt[0], Mapping):
                return self.chat_tokens(prompt)
            return [int(i) for i in prompt]

        return single, [ids(p) for p in ([prompt] if single else prompt)]

    def _with_room(self, tokens: int) -> language_model.LanguageModel:
        """Returns the model with full-attention caches that hold `tokens` tokens.

        Their size is rounded up to a power of two, so that similar prompts share compiled programs.
        The model is returned unchanged where its context is too short.
        """
        limit, _ = sampling.context_limit(self.model) or (0, "")
        if tokens > limit:
            return self.model
        room = max(_LEAST_ROOM, 1 << (tokens - 1).bit_length())
        return self.with_max_len(min(room, limit)).model


def load(source: str | Path, tokenizer: str = "", **options) -> LoadedModel:
    """Loads a model with its tokenizer; arguments and errors are those of `seqmodels.load`."""
    try:
        return _load(str(source), tokenizer, **options)
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise ValueError(
            "a tokenizer is read by the package tokenizers, which is not installed: "
            "pip install 'linear-seqmodels[gguf]', or [hub], or [train]"
        ) from error


def _load(
    source: str, tokenizer: str, *, dtype=None, max_len=None, step=None, **options
) -> LoadedModel:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if not runs.is_run(source):
        if step is not None:
            raise ValueError(f"{source} is not the folder of a run: it has no step {step}")
        if runs.is_run(Path(source) / "student"):
            raise ValueError(f"{source} holds a linearization; its student is {source}/student")
        found = checkpoints_io.load_pretrained(source, dtype=dtype, max_len=max_len, **options)
        return with_tokenizer(found, tokenizer)
    config = runs.read_config(source)["model"]
    # Parameters in the dtype they are multiplied in: the same numbers in less memory.
    how = {"param_dtype": dtype or config.get("dtype", "float32")}
    if dtype:  # float16 is too narrow for activations
        how["dtype"] = "float32" if dtype == "float16" else dtype
    found = runs.load_run(source, step=step, model_config=config | how)
    loaded = with_tokenizer(found, tokenizer, starts_documents=True)
    return loaded if max_len is None else loaded.with_max_len(max_len)


def find(source: str, *, max_len: int | None = None, **options) -> checkpoints_io.Pretrained:
    """Returns the parameters and configs of a source without a tokenizer, to convert or train them.

    source: as in `seqmodels.load`; a run's parameters keep the dtype they are trained in.
    max_len: tokens that full-attention layers can hold. options: those of
      `checkpoints_io.load_pretrained`, not used for runs.
    """
    if not runs.is_run(source):
        return checkpoints_io.load_pretrained(source, max_len=max_len, **options)
    found = runs.load_run(source)
    config = checkpoints_io.with_max_len(found.model_config, max_len, source)
    return dataclasses.replace(found, model_config=config)


def with_tokenizer(
    found: checkpoints_io.Pretrained, tokenizer: str = "", *, starts_documents: bool = False
) -> LoadedModel:
    """Returns a LoadedModel of parameters and configs that were read, and a tokenizer.

    found: from `find` or `load_pretrained`. tokenizer: "bytes" or the path of a tokenizer.json; ""
      takes the source's own. starts_documents: see `LoadedModel`.

    Raises ValueError where there is no tokenizer, or it is of another vocabulary.
    """
    found = with_given_tokenizer(found, tokenizer)
    name = str(found.tokenizer_path or "")
    if not name and is_of_bytes(found):
        name = tokenizers.BYTES
    if not name:
        raise ValueError(
            f"{found.source} has no tokenizer.json; give the path of one as tokenizer, or 'bytes'"
        )
    token = found.hf_config.get("document_token")
    if not isinstance(token, str):
        token = "" if name == tokenizers.BYTES else _document_token(name, found)
    text = tokenizers.make_tokenizer(name, token)
    if text.document_id >= found.model_config["vocab_size"]:
        raise ValueError(
            f"documents begin with token {text.document_id} of the tokenizer {name}, and the model "
            f"{found.source} has {found.model_config['vocab_size']} tokens: it is another model's"
        )
    return LoadedModel(found, found.model, text, name, token, starts_documents)


def is_of_bytes(found: checkpoints_io.Pretrained) -> bool:
    """Returns whether a model's own tokenizer is "bytes", which needs no file."""
    return found.hf_config.get("tokenizer") == tokenizers.BYTES


def with_given_tokenizer(
    found: checkpoints_io.Pretrained, tokenizer: str
) -> checkpoints_io.Pretrained:
    """Returns `found` with the tokenizer that a user gives in place of its own.

    tokenizer: "bytes" or the path of a tokenizer.json; "" returns `found` unchanged.

    Raises ValueError for a tokenizer whose number of ids differs from the model's vocabulary by
    more than a tenth of it and more than 256: it is another model's. Smaller differences occur, as
    models round their vocabularies up and tokenizers get tokens that the model never learned; an id
    outside the vocabulary raises an error where it occurs.
    """
    if not tokenizer:
        return found
    path = Path(tokenizer).expanduser()
    of_bytes = tokenizer == tokenizers.BYTES
    size = tokenizers.ByteTokenizer.vocab_size if of_bytes else _open(str(path)).get_vocab_size()
    vocab_size = found.model_config["vocab_size"]
    if abs(size - vocab_size) > max(vocab_size // 10, 256):
        raise ValueError(
            f"the tokenizer {tokenizer} has {size} ids and the model {found.source} {vocab_size}: "
            "it is another model's"
        )
    if of_bytes:
        own = found.hf_config | {"tokenizer": tokenizer, "document_token": ""}
        return dataclasses.replace(found, hf_config=own, tokenizer_path=None)
    path = special_tokens.completed(path)
    tokens = found.tokens.filled(special_tokens.read(path.parent))
    return dataclasses.replace(found, tokenizer_path=path, tokens=tokens)


def _is_prompt(value) -> bool:
    """Returns whether a value is one prompt, a text, messages or token ids, rather than a list.

    Raises ValueError for a value that is neither.
    """
    if isinstance(value, str):
        return True
    if not isinstance(value, Sequence | np.ndarray):
        raise ValueError(
            f"a prompt is a text, messages or token ids, or a list of these; got {value!r}"
        )
    return len(value) > 0 and not isinstance(value[0], str) and np.ndim(value[0]) == 0


def _document_token(path: str, found: checkpoints_io.Pretrained) -> str:
    """Returns the token that separated documents in pretraining, guessed from a model's files.

    It is "<|endoftext|>" if the tokenizer at `path` has it, else the model's begin token, else an
    end token. Raises ValueError where there is none of these.
    """
    file, tokens = _open(path), found.tokens
    for i in (file.token_to_id(WHOLE_TEXT), tokens.bos, *tokens.eos):
        if i is None or i >= found.model_config["vocab_size"]:
            continue
        if token := file.id_to_token(i):
            return token
    raise ValueError(
        f"{path}: no token is known to separate documents; the files beside it name none"
    )


_open = functools.lru_cache(maxsize=2)(tokenizers.open_file)
