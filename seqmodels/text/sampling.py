"""Samples text from a language model, for several prompts of different lengths together.

How prompts are read. Each prompt has a row of its own, since a row of several packed documents
leaves only the last one's state. Padding that makes rows equally long stands before the prompt, as
a document of its own. No mixer lets documents affect each other, so the state after the row is that
of the prompt alone. All rows end together, so that they decode together, and a full-attention cache
holds no more tokens than the longest prompt has. Prompts are sorted, so that those of one batch
have similar lengths and need little padding.

Rows are fed in pieces whose lengths are powers of two that add up to the longest prompt's length.
Prompts of all lengths therefore need at most log2(MAX_PIECE) + 1 compiled programs, and memory for
one piece.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import mixers
from seqmodels.array_typing import Array
from seqmodels.mixers.attention import KeyValueCache
from seqmodels.text.tokenizers import Tokenizer

MAX_PIECE = 512
_PADDING, _PROMPT = 0, 1  # segment ids


def sample_token(
    key: Array,
    logits_BW: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Draws one token id per row, (B,) int32, from softmax(logits / temperature).

    temperature: 0 takes the most likely token. top_k: draws among the k most likely tokens only.
    top_p: draws among the fewest most likely tokens whose probabilities sum to p, at the given
    temperature (nucleus sampling, arXiv 1904.09751); the most likely token is always among them.
    """
    if temperature < jnp.finfo(jnp.float32).tiny:  # smaller ones are 0 to many devices
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    # The most likely token gets 0: a small temperature makes the others -inf, and none inf.
    logits_BW = (logits_BW - logits_BW.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        kth_B = jax.lax.top_k(logits_BW, min(top_k, logits_BW.shape[-1]))[0][:, -1]
        logits_BW = jnp.where(logits_BW < kth_B[:, None], -jnp.inf, logits_BW)
    if top_p is not None:
        # A token is outside if those more likely than it reach p without it.
        order_BW = jnp.argsort(-logits_BW, axis=-1)
        p_BW = jnp.take_along_axis(jax.nn.softmax(logits_BW), order_BW, axis=-1)
        before_BW = jnp.cumsum(p_BW, axis=-1) - p_BW
        outside_BW = (before_BW >= top_p).at[:, 0].set(False)
        # Back from the order of likelihood to that of ids.
        outside_BW = jnp.take_along_axis(outside_BW, jnp.argsort(order_BW, axis=-1), axis=-1)
        logits_BW = jnp.where(outside_BW, -jnp.inf, logits_BW)
    return jax.random.categorical(key, logits_BW).astype(jnp.int32)


def _draw(logits_BW, key_data_BK, i, options):
    """Draws the i-th new token of each row, with the row's own random key.

    A row's tokens therefore do not depend on other rows. options: (temperature, top_k, top_p).
    """

    def row(key_data, logits_W):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), i)
        return sample_token(key, logits_W[None], *options)[0]

    return jax.vmap(row)(key_data_BK, logits_BW)


_draw_first = jax.jit(_draw, static_argnames="options")


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _read(model, params, state, tokens_BT, segment_ids_BT=None):
    """Feeds tokens to the model; returns logits_BW after each row's last token, and the state."""

    def last(x_BTD, matrix, layout):
        return model.logits(x_BTD[:, -1:], matrix, layout)[:, 0]

    return model.apply({"params": params}, tokens_BT, segment_ids_BT, state, head=last)


@functools.partial(jax.jit, static_argnames=("model", "options"), donate_argnames="state")
def _next_token(model, params, state, token_B, key_data_BK, i, *, options):
    logits_BW, state = _read(model, params, state, token_B[:, None])
    return _draw(logits_BW, key_data_BK, i, options), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(model, batch):
    return model.init_state(batch)


def _keys(seed: int, numbers: Sequence[int]) -> np.ndarray:
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return np.asarray(jax.random.key_data(fold(jax.random.key(seed), np.asarray(numbers))))


def stream_batch(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Returns an iterator that yields the next token of every prompt, (B,), `length` times.

    temperature, top_k and top_p are those of `sample_token`.

    prompts: token ids, at least one per prompt, of any lengths. A prompt's continuation does not
      depend on the other prompts.
    numbers: a number per prompt that, with `seed`, fixes its random draws; None counts from 0.

    Raises ValueError for an empty prompt, ids outside the vocabulary, options out of range, and
    where a full-attention layer's cache or the learned positions are too short.
    """
    check_options(temperature, top_k, top_p)
    _check_prompts(model, prompts)
    check_length(model, max(map(len, prompts)), length)
    key_data_BK = _keys(seed, range(len(prompts)) if numbers is None else numbers)
    options = (temperature, top_k, top_p)
    return _steps(model, params, prompts, length, key_data_BK, options)


def _steps(model, params, prompts, length, key_data_BK, options) -> Iterator[np.ndarray]:
    # Padding before each prompt, as a document of its own.
    T = max(map(len, prompts))
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    segment_ids_BT = np.full(tokens_BT.shape, _PADDING, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = prompt
        segment_ids_BT[row, T - len(prompt) :] = _PROMPT
    state = _initial_state(model, len(prompts))
    if jax.process_count() > 1:  # NumPy arrays go to all devices, those of one process do not
        state = jax.device_get(state)
    # Prefill, a power of two of tokens at a time.
    start, logits_BW = 0, None
    for size in pieces(T):
        piece = slice(start, start + size)
        logits_BW, state = _read(
            model, params, state, tokens_BT[:, piece], segment_ids_BT[:, piece]
        )
        start += size
    # Decoding: each step reads the token that the last one drew, and draws the next.
    token_B = _draw_first(logits_BW, key_data_BK, 0, options=options)
    for i in range(1, length):
        yield np.asarray(token_B)
        token_B, state = _next_token(model, params, state, token_B, key_data_BK, i, options=options)
    yield np.asarray(token_B)


def pieces(length: int) -> list[int]:
    """Returns powers of two, each at most MAX_PIECE and the largest first, that sum to `length`."""
    rest = length % MAX_PIECE
    powers = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [MAX_PIECE] * (length // MAX_PIECE) + powers


def generate(
    model,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    batch_size: int = 8,
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
    **options,
) -> list[str]:
    """Returns the text with which the model continues each prompt, in the order of the prompts.

    A text ends after `length` tokens, or before its first stop string or stop token.

    prompts: token ids. batch_size: number of prompts, sorted by length, that are read and continued
      together; a batch ends when all its texts have.
    stop_tokens: ids that end a text; None is the tokenizer's document_id.
    options: temperature, top_k, top_p and seed, as `stream_batch` takes them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    _check_prompts(model, prompts)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batch_size = min(batch_size, len(prompts))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        filled = numbers + numbers[-1:] * (batch_size - len(numbers))
        tokens = stream_batch(
            model, params, [prompts[i] for i in filled], length, numbers=filled, **options
        )
        own = [prompts[i] for i in numbers]
        for row, text in stream_texts(tokens, tokenizer, own, stop, stop_tokens):
            texts[numbers[row]] += text
    return texts


def stream_texts(
    tokens: Iterator[np.ndarray],
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Returns an iterator that yields (row, piece of text) as the tokens of a batch are drawn.

    A row's text ends before its first stop string or stop token, and the iterator when all rows
    have ended.

    tokens: token_B of each step, as from `stream_batch`. prompts: token ids that the first rows
      continue; rows beyond them are ignored.
    stop_tokens: ids that end a text; None is the tokenizer's document_id.
    """
    texts = [TextStream(tokenizer, stop, prompt) for prompt in prompts]
    return _pieces_of_text(
        tokens, texts, [tokenizer.document_id] if stop_tokens is None else stop_tokens
    )


def _pieces_of_text(tokens, texts, stop_tokens) -> Iterator[tuple[int, str]]:
    for token_B in tokens:
        for row, text in enumerate(texts):
            if not text.ended:
                token = int(token_B[row])
                shown = text.end() if token in stop_tokens else text.add(token)
                if shown:
                    yield row, shown
        if all(text.ended for text in texts):
            return
    for row, text in enumerate(texts):
        if not text.ended and (shown := text.end()):
            yield row, shown


class TextStream:
    """Decodes tokens to text one by one, in whole characters, up to the first stop string.

    Joined, the strings that `add` and `end` return are the text that the tokens add to the decoded
    prompt, cut before the first stop string; text that may begin a stop string is held back until
    that is decided. `ended` says whether a stop string or `end` has ended the text. Stop strings
    are also found in special tokens, such as "<|im_end|>", which are not part of the text.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty: it would stop every text before it starts")
        self.ended = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Text that a stop string may begin with, and for each of its characters whether it is
        # shown.
        self._held, self._is_shown = "", []
        self._go_on_from([i for i in prompt if i not in tokenizer.special_texts])

    def add(self, token: int) -> str:
        """Adds a token; returns the new text that no later token can change or cut off."""
        special = self._tokenizer.special_texts.get(token)
        if special is not None:
            return self._release(special, shown=False)
        self._pending.append(token)
        new = self._new()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):  # the start of a character
            return ""
        self._go_on_from(self._pending)
        return self._release(new)

    def end(self) -> str:
        """Ends the text after the last token; returns the text that was held back until now."""
        text = self._release(self._new())
        if self.ended:
            return text
        self.ended = True
        return text + self._take(len(self._held))

    def _go_on_from(self, tokens: list[int]) -> None:
        """Makes `tokens`, whose text is out already, the context in which later tokens are decoded.

        Later tokens' text may depend on this context: `_new` decodes both and returns what follows
        the context's text. `tokens` must end with a whole character.
        """
        self._context, self._pending = tokens, []
        self._told = self._tokenizer.decode(tokens)

    def _new(self) -> str:
        """Returns the text that the pending tokens add to the context's text."""
        return self._tokenizer.decode(self._context + self._pending)[len(self._told) :]

    def _release(self, text: str, shown: bool = True) -> str:
        """Appends to the text held back; returns and removes the part that no stop string can cut.

        shown: whether the appended text is part of the result, as a special token's is not. Sets
          `ended` where the text held back contains a stop string.
        """
        self._held += text
        self._is_shown += [shown] * len(text)
        found = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if found:
            self.ended = True
            return self._take(min(found))
        may_begin = (
            n
            for s in self._stop
            for n in range(1, min(len(s), len(self._held) + 1))
            if self._held.endswith(s[:n])
        )
        return self._take(len(self._held) - max(may_begin, default=0))

    def _take(self, count: int) -> str:
        """Removes the first `count` characters of the text held back; returns the shown ones."""
        text = "".join(itertools.compress(self._held[:count], self._is_shown))
        self._held, self._is_shown = self._held[count:], self._is_shown[count:]
        return text


def prompt_tokens(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Returns a prompt's token ids after document_id, the token that begins every document."""
    return [tokenizer.document_id, *tokenizer.encode(prompt).tolist()]


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a temperature, top_k or top_p out of range (see `sample_token`)."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1], or be left out")


def _check_prompts(model, prompts: Sequence[Sequence[int]]) -> None:
    if not len(prompts):
        raise ValueError("there are no prompts; give at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"the prompt has no tokens (number {i} of {len(prompts)}); start with the "
                "tokenizer's document_id"
            )
        check_ids(model, prompt)


def check_ids(model, tokens: Sequence[int] | np.ndarray) -> None:
    """Raises ValueError where a token id lies outside the model's vocabulary."""
    ids = np.asarray(tokens)
    outside = ids[(ids < 0) | (ids >= model.vocab_size)]
    if outside.size:
        raise ValueError(
            f"token id {outside[0]} is not in the model's vocabulary of {model.vocab_size}: use "
            "the tokenizer that the model was trained with, or a text without this token"
        )


def context_limit(model) -> tuple[int, str] | None:
    """Returns (the most tokens that a model can read, what limits it), or None without a limit.

    The limit is the shortest cache of its full-attention layers, its learned positions, or the
    positions that layers have weights for.
    """

    def is_cache(x):
        return isinstance(x, KeyValueCache)

    state = jax.eval_shape(lambda: model.init_state(1))
    caches = filter(is_cache, jax.tree.leaves(state, is_leaf=is_cache))
    slots = {cache.position_BS.shape[-1] for cache in caches}
    limits = []
    if model.learned_positions is not None:
        limits.append((model.learned_positions, "the model's learned positions"))
    for spec in model.mixers:
        options = mixers.options(spec.name) | dict(spec.options)
        if mixers.mixer_class(spec.name).bounded:
            length = options["max_length"]
            limits.append((length, f"the weights of {spec.name} layers, max_length={length}"))
        elif options.get("max_length") in slots and options.get("window") is None:
            length = options["max_length"]
            cache = f"the cache of {spec.name} layers, max_length={length}"
            limits.append((length, cache))
    return min(limits, default=None)


def check_length(model, prompt_tokens: int, length: int) -> None:
    """Raises ValueError if a model cannot read `prompt_tokens` tokens and `length` new ones.

    It also raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"{length} tokens are to be generated; it must be 1 at least")
    limit, what = context_limit(model) or (None, None)
    # The last token sampled is never fed back.
    if limit and prompt_tokens + length - 1 > limit:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {length} more do not fit into {what} ({limit} "
            "tokens). Generate less, or set max_length in config.model.pattern"
        )
