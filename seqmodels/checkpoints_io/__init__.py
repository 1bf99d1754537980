"""Pretrained weights in and out: Hugging Face folders (safetensors + config.json), GGUF files, and
our own layout."""

from seqmodels.checkpoints_io.pretrained import (
    Pretrained,
    load_pretrained,
    same_model,
    save_pretrained,
    with_max_len,
)
from seqmodels.checkpoints_io.special_tokens import SpecialTokens

__all__ = [
    "Pretrained",
    "SpecialTokens",
    "load_pretrained",
    "same_model",
    "save_pretrained",
    "with_max_len",
]
