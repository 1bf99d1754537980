"""Pretrained weights in and out: Hugging Face folders (safetensors + config.json), GGUF files, and our own layout."""

from seqmodels.checkpoints_io.pretrained import (
    Pretrained,
    load_pretrained,
    same_model,
    save_pretrained,
    token_id,
    with_max_len,
)

__all__ = [
    "Pretrained",
    "load_pretrained",
    "same_model",
    "save_pretrained",
    "token_id",
    "with_max_len",
]
