"""GGUF files are read where the extra [gguf] is installed."""

import importlib.util

if importlib.util.find_spec("gguf") is None:
    collect_ignore = ["test_gguf.py"]
