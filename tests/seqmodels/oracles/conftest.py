"""PyTorch models of Hugging Face transformers as oracles: collected where the extra `oracles` is installed."""

import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]
