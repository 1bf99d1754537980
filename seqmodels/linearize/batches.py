"""Calls models of any architecture on a batch, and on an example of one for their parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels import denoiser, encoder, language_model
from seqmodels.array_typing import Array
from seqmodels.modules import stack

EXAMPLE_LENGTH = 7


def arguments(model: stack.Stack, batch: dict[str, Array]) -> tuple:
    """Returns what `model.apply` takes of a batch, after the variables.

    A language model reads tokens, an encoder patches or tokens, and a denoiser the patches that the
    batch's noise is added to at the batch's times.
    """
    if isinstance(model, language_model.LanguageModel):
        return batch["inputs"], batch["segment_ids"]
    place = batch["segment_ids"], batch.get("coordinates")
    if isinstance(model, encoder.Encoder):
        return batch["inputs"], *place
    noised_BTE = model.process.noised(batch["inputs"], batch["noise"], batch["time"])
    return noised_BTE, batch["time"], batch["labels"], *place


def example(model: stack.Stack, length: int = EXAMPLE_LENGTH) -> dict[str, Array]:
    """Returns a batch of one row of `length` tokens, of zeros, that a model can be called on."""
    ids_BT = jnp.zeros((1, length), jnp.int32)
    batch = {"inputs": ids_BT, "labels": ids_BT, "segment_ids": ids_BT + 1}
    if isinstance(model, encoder.GridModel) and not getattr(model, "vocab_size", 0):
        batch["inputs"] = jnp.zeros((*ids_BT.shape, model.input_dim), jnp.float32)
    if isinstance(model, denoiser.Denoiser):
        batch["noise"] = batch["inputs"]
        batch["time"] = jnp.zeros(ids_BT.shape, jnp.float32)
    return batch


def init(model: stack.Stack, key: Array) -> dict[str, Any]:
    """Returns a model's parameters as it draws them, boxed with their axes' names.

    Raises ValueError for a model that has further collections, such as statistics of batches, which
    conversions do not carry.
    """
    variables: Any = model.init(key, *arguments(model, example(model)))
    others = set(variables) - {"params", "intermediates", stack.LOSSES}
    if others:
        raise ValueError(
            f"a model with {', '.join(sorted(others))} beside its parameters cannot be converted: "
            "take norms without statistics of batches"
        )
    return variables["params"]


@functools.lru_cache(maxsize=16)
def boxed_params(model: stack.Stack) -> dict[str, Any]:
    """Returns a model's parameters as shapes and dtypes, boxed with their axes' names."""
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
