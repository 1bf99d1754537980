"""Sampling tokens from a language model: prefill in one call, then one token a call with a state of constant size."""

import codecs
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import mixers
from seqmodels.array_typing import Array

_CONTEXT_TOKENS = 8  # how far back a tokenizer's spelling of a token may look


def sample_token(
    key: Array,
    logits_BW: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Token ids (B,) drawn from softmax(logits / temperature).

    temperature: 0 takes the most likely token. top_k: only among the k most likely. top_p: only among the fewest whose
    probability reaches p, at the given temperature (nucleus sampling, arXiv 1904.09751); the most likely always stays.
    """
    if temperature == 0:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    logits_BW = logits_BW / temperature
    if top_k is not None:
        kth_B = jax.lax.top_k(logits_BW, min(top_k, logits_BW.shape[-1]))[0][:, -1]
        logits_BW = jnp.where(logits_BW < kth_B[:, None], -jnp.inf, logits_BW)
    if top_p is not None:
        order_BW = jnp.argsort(-logits_BW, axis=-1)
        p_BW = jnp.take_along_axis(jax.nn.softmax(logits_BW), order_BW, axis=-1)
        before_BW = jnp.cumsum(p_BW, axis=-1) - p_BW
        outside_BW = (before_BW >= top_p).at[:, 0].set(False)
        outside_BW = jnp.take_along_axis(outside_BW, jnp.argsort(order_BW, axis=-1), axis=-1)
        logits_BW = jnp.where(outside_BW, -jnp.inf, logits_BW)
    return jax.random.categorical(key, logits_BW).astype(jnp.int32)


@functools.partial(
    jax.jit, static_argnames=("model", "temperature", "top_k", "top_p"), donate_argnames="state"
)
def _next_token(model, params, state, tokens_BT, key_data, i, *, temperature, top_k, top_p):
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), i)
    logits_BTW, state = model.apply({"params": params}, tokens_BT, state=state)
    token_B = sample_token(key, logits_BTW[:, -1], temperature, top_k, top_p)
    return token_B[:, None], state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(model, batch):
    return model.init_state(batch)


def stream_tokens(
    model,
    params,
    prompt: Sequence[int],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yields up to `length` tokens that continue `prompt` (at least one id); ends before `stop_token`.

    Raises ValueError for an empty prompt, options out of range, and where a full-attention layer's cache is too short.
    """
    check_options(temperature, top_k, top_p)
    if len(prompt) == 0:
        raise ValueError("the prompt has no tokens; start with the tokenizer's document_id")
    check_length(model, len(prompt), length)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    state = _initial_state(model, 1)
    if jax.process_count() > 1:  # NumPy arrays go to all devices, those of one process do not
        state = jax.device_get(state)
    tokens_BT = np.asarray(prompt, np.int32)[None]
    for i in range(length):
        tokens_BT, state = _next_token(model, params, state, tokens_BT, key_data, i, **options)
        token = int(np.asarray(tokens_BT)[0, 0])
        if token == stop_token:
            return
        yield token


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1], or be left out")


def check_length(model, prompt_tokens: int, length: int) -> None:
    """Raises ValueError if a full-attention layer's cache cannot hold the prompt and what is generated."""
    for spec in model.mixers:
        options = mixers.options(spec.name) | dict(spec.options)
        limit = options.get("max_length")
        # The last token sampled is never fed back.
        if limit and options.get("window") is None and prompt_tokens + length - 1 > limit:
            raise ValueError(
                f"{prompt_tokens} prompt tokens and {length} more do not fit into the cache of {spec.name} "
                f"layers, max_length={limit}. Generate less, or set max_length in config.model.pattern"
            )


def stream_text(tokens: Iterator[int], tokenizer) -> Iterator[str]:
    """Text as the tokens come, never half a character. Joined, it is `tokenizer.decode` of all of them."""
    if hasattr(tokenizer, "decode_bytes"):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(tokenizer.decode_bytes([token]))
        yield decoder.decode(b"", final=True)
        return
    # The last tokens are decoded together: what a token spells may depend on those before it.
    window, shown = [], ""
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        yield text[len(shown) :]
        window, shown = window[-_CONTEXT_TOKENS:], tokenizer.decode(window[-_CONTEXT_TOKENS:])
    yield tokenizer.decode(window)[len(shown) :]


def prompt_tokens(prompt: str, tokenizer) -> list[int]:
    """The ids of a prompt as the start of a document; an empty one is the document's start alone."""
    return [tokenizer.document_id, *map(int, tokenizer.encode(prompt))]
