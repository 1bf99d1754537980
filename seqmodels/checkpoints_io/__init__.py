"""Reads and writes pretrained models: Hugging Face folders (config.json and safetensors), in
published layouts or our own. Reads GGUF files, too."""

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
